"""Turns raw rows into token rows on disk: reads, converts, renders with the chat template, masks, and holds some rows out."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from conf.errors import DataError, Problem
from conf.files import new_folder, read_json, write_json
from conf.schema import Config, Format, Overlong
from jobs import chat, formats, sources
from jobs.model import tokenizer

Placed = tuple[str, sources.Row]
"""A raw row, after the place it came from."""
SHOWN = 10
"""Bad rows that a message names; all are counted."""


def run(config: Config) -> None:
    """Write RUN/data, unless it is there already. Raises DataError naming the bad rows by file and line."""
    folder = Path(config.run_dir) / "data"
    if read_json(folder / "data.json"):
        print(f"data is there already: {folder}")
        return
    rows = list(islice(sources.rows(config.data.path), config.data.max_rows))
    shape = choose_format(rows[0], config)
    words = tokenizer(config)
    if config.data.validation_path:
        validation = list(sources.rows(config.data.validation_path))
    else:
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
        write_json(beside / "data.json", {"format": shape, "source": config.data.path, **counts})
    print(f"data      {dict(counts)}", flush=True)


def choose_format(first: Placed, config: Config) -> str:
    """The format asked for, or the one that the first row's columns show; says which, and why."""
    where, row = first
    if config.data.format is not Format.auto:
        return config.data.format.name
    try:
        shape, why = formats.recognise(row, config.data.fields)
    except ValueError as error:
        raise DataError(Problem("data.format", "auto", f"{error} ({where})")) from error
    print(f"format    {shape}: {why}", flush=True)
    return shape


def hold_out(rows: list[Placed], config: Config) -> tuple[list[Placed], list[Placed]]:
    """Split off a random share of the rows, at least one, by seed; both parts keep their order."""
    count = max(1, round(len(rows) * config.data.validation_fraction))
    chosen = set(np.random.default_rng(config.data.seed).permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def encode(
    rows: list[Placed], shape: str, words: PreTrainedTokenizerBase, config: Config, counts: Counter[str], split: str
) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, 1 where trained) of each row that fits. Counts what is dropped or cut.

    Raises DataError, after all rows have been seen, naming the first that cannot be used.
    """
    data, bad = config.data, []
    for where, row in tqdm(rows, desc=f"tokenise {split}", unit=" rows", mininterval=1):
        try:
            sample = formats.convert(row, shape, data.fields, data.roles)
            ids, trained = chat.encode(sample, words, mask=data.mask.name)
            if len(ids) > data.max_length and data.overlong is Overlong.error:
                raise ValueError(f"has {len(ids)} tokens, over data.max_length={data.max_length}; see data.overlong")
        except ValueError as error:
            bad.append(Problem(where, None, str(error)))
            continue
        if len(ids) > data.max_length:
            counts[f"{split} overlong"] += 1
            if data.overlong is Overlong.drop:
                continue
            ids, trained = ids[: data.max_length], trained[: data.max_length]
        if not any(trained[1:]):
            counts[f"{split} without a trained token"] += 1
            continue
        counts[f"{split} rows"] += 1
        counts[f"{split} tokens"] += len(ids)
        counts[f"{split} trained tokens"] += sum(trained[1:])
        yield ids, trained
    if bad:
        more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        raise DataError(f"{len(bad)} of {len(rows)} rows cannot be used as {shape}:", *bad[:SHOWN], *more)


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
