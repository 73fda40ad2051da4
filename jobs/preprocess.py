"""Turns raw rows into token rows on disk: reads, renders with the chat template, masks, splits, and shows a decoded sample."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from conf.errors import DataError, Problem
from conf.files import new_folder, read_json, write_json
from conf.schema import Config, Format, Overlong
from jobs.model import tokenizer

Row = dict[str, Any]


def run(config: Config) -> None:
    """Write RUN/data, unless it is there already for the same data and tokenizer settings."""
    folder = Path(config.run_dir) / "data"
    if read_json(folder / "data.json"):
        print(f"data is there already: {folder}")
        return
    rows = load_rows(config.data.path, config.data.max_rows)
    shape = recognise(rows[0], config)
    print(f"{len(rows)} rows of format {shape.name} from {config.data.path}", flush=True)
    words = tokenizer(config)
    validation = load_rows(config.data.validation_path, None) if config.data.validation_path else None
    if validation is None:
        rows, validation = hold_out(rows, config)
    counts: Counter[str] = Counter()
    with new_folder(folder) as beside:
        for split, part in (("train", rows), ("validation", validation)):
            encoded = list(encode(part, shape, words, config, counts, split))
            if not encoded:
                raise DataError(
                    Problem(
                        "data.path",
                        config.data.path,
                        f"leaves no rows to {'train on' if split == 'train' else 'hold out'} "
                        f"({dict(counts)}); see data.max_length and data.validation_fraction",
                    )
                )
            write(beside, split, encoded)
            if split == "train":
                preview(encoded[0], words)
        words.save_pretrained(beside / "tokenizer")
        write_json(beside / "data.json", {"format": shape.name, "source": config.data.path, **counts})
    print(f"data      {dict(counts)}", flush=True)


def load_rows(path: str, limit: int | None) -> list[Row]:
    """Rows of a JSON array, a JSONL file, or a Hub data set's train split. Raises DataError naming file and line."""
    if not Path(path).exists():
        return _from_hub(path, limit)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            Problem("data.path", path, f"is not UTF-8 at byte {error.start}: convert it, e.g. with iconv")
        ) from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                Problem("data.path", f"{path}:{error.lineno}", f"is not valid JSON: {error.msg}")
            ) from error
        if strange := next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
            raise DataError(Problem("data.path", path, f"row {strange} is not an object with named columns"))
    else:
        rows = [_parse(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise DataError(Problem("data.path", path, "has no rows"))
    return rows[:limit]


def recognise(row: Row, config: Config) -> Format:
    """The format of rows with these columns. Raises DataError when it is not the one asked for, or none we know."""
    fits = {
        Format.messages: isinstance(row.get("messages"), list),
        Format.alpaca: {"instruction", "output"} <= row.keys(),
        Format.text: isinstance(row.get("text"), str),
    }
    found = [shape for shape, fit in fits.items() if fit]
    if config.data.format is Format.auto and found:
        return found[0]
    if config.data.format in found:
        return config.data.format
    raise DataError(
        Problem(
            "data.format",
            config.data.format.name,
            f"does not fit the columns {sorted(row)} of {config.data.path}: "
            "alpaca needs instruction and output, messages a list `messages`, text a column `text`",
        )
    )


def hold_out(rows: list[Row], config: Config) -> tuple[list[Row], list[Row]]:
    """Split off a random share of the rows, at least one, by seed; both parts keep the file's order."""
    count = max(1, round(len(rows) * config.data.validation_fraction))
    chosen = set(np.random.default_rng(config.data.seed).permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def encode(
    rows: list[Row], shape: Format, words: PreTrainedTokenizerBase, config: Config, counts: Counter[str], split: str
) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, 1 where trained) of each row that fits. Counts what is dropped or cut. Raises DataError naming the row."""
    for number, row in enumerate(tqdm(rows, desc=f"tokenise {split}", unit=" rows", mininterval=1), 1):
        try:
            ids, trained = (
                _encode_text(row, words) if shape is Format.text else _encode_chat(_messages(row, shape), words)
            )
        except (KeyError, TypeError, ValueError, TemplateError) as error:
            raise DataError(
                Problem(
                    f"row {number} of {split}", config.data.path, f"cannot be rendered: {type(error).__name__} {error}"
                )
            ) from error
        if len(ids) > config.data.max_length:
            counts[f"{split} overlong"] += 1
            if config.data.overlong is Overlong.error:
                raise DataError(
                    Problem(
                        f"row {number} of {split}",
                        config.data.path,
                        f"has {len(ids)} tokens, over data.max_length={config.data.max_length}; see data.overlong",
                    )
                )
            if config.data.overlong is Overlong.drop:
                continue
            ids, trained = ids[: config.data.max_length], trained[: config.data.max_length]
        if not any(trained[1:]):
            counts[f"{split} without a trained token"] += 1
            continue
        counts[f"{split} rows"] += 1
        counts[f"{split} tokens"] += len(ids)
        counts[f"{split} trained tokens"] += sum(trained[1:])
        yield ids, trained


def write(folder: Path, split: str, rows: list[tuple[list[int], list[int]]]) -> None:
    """Three arrays: all tokens (int32), which are trained (uint8), and where each row begins (int64, one more than rows)."""
    np.save(folder / f"{split}.tokens.npy", np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in rows]))
    np.save(folder / f"{split}.trained.npy", np.concatenate([np.asarray(mask, dtype=np.uint8) for _, mask in rows]))
    np.save(folder / f"{split}.offsets.npy", np.cumsum([0] + [len(ids) for ids, _ in rows], dtype=np.int64))


def preview(row: tuple[list[int], list[int]], words: PreTrainedTokenizerBase) -> None:
    """Print one decoded row, the trained tokens in green: what the model will see, and learn to say."""
    shown = []
    for trained, part in groupby(zip(*row, strict=True), key=lambda item: item[1]):
        text = words.decode([token for token, _ in part])
        shown.append(f"\033[32m{text}\033[0m" if trained else text)
    print("first training row, trained tokens in green:\n" + "".join(shown).rstrip(), flush=True)


def _from_hub(path: str, limit: int | None) -> list[Row]:
    from datasets import load_dataset

    try:
        found = load_dataset(path, split="train")
    except Exception as error:  # whatever the Hub client raises: offline, no such set, a gated one
        raise DataError(
            Problem("data.path", path, f"is no file, and the Hub says: {str(error).splitlines()[0]}")
        ) from error
    return list(found if limit is None else found.select(range(min(limit, len(found)))))


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            Problem("data.path", where, f"is not valid JSON: {error.msg} at column {error.colno}")
        ) from error
    if not isinstance(row, dict):
        raise DataError(Problem("data.path", where, "is not an object with named columns"))
    return row


def _messages(row: Row, shape: Format) -> list[dict[str, str]]:
    if shape is Format.messages:
        return list(row["messages"])
    question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _encode_text(row: Row, words: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    ids = [*words(row["text"]).input_ids, words.eos_token_id]
    return ids, [1] * len(ids)


def _encode_chat(messages: list[dict[str, str]], words: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Assistant turns are trained. Their bounds are the template's: its generation marks, or where it stops without the turn."""
    if not words.chat_template:
        raise DataError(
            Problem(
                "model.tokenizer",
                words.name_or_path,
                "has no chat template; use rows with a `text` column, or a chat model's tokenizer",
            )
        )
    if "{% generation %}" in words.chat_template or "{%- generation" in words.chat_template:
        found = words.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), list(found["assistant_masks"])
    ids = _render(messages, words)
    trained = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = (
                _render(messages[:turn], words, add_generation_prompt=True),
                _render(messages[: turn + 1], words),
            )
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise ValueError("the chat template rewrites earlier turns, so the bounds of the answer cannot be told")
            trained[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, trained


def _render(messages: list[dict[str, str]], words: PreTrainedTokenizerBase, **options: bool) -> list[int]:
    return list(words.apply_chat_template(messages, return_dict=True, **options)["input_ids"])
