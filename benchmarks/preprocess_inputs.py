"""Makes the inputs of the benchmark of preprocess: files of raw rows, and a tokenizer.

Without files of the user, the rows are the docstrings of torch and transformers (16 MB of English text and code that every
installation has), and the vocabulary is trained on them: 41,000 tokens of about 4.2 characters.
"""

import importlib.util
import inspect
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parent.parent
CHATML = CLONE / "jobs/tokenization/chat_templates/chatml.jinja"
DOCSTRING = re.compile(r'^ *r?"""(.{200,}?)"""', re.DOTALL | re.MULTILINE)


@cache
def docstrings() -> dict[str, str]:
    """The long docstrings of torch and transformers, each with the name of its module."""
    texts: dict[str, str] = {}
    for package in ("torch", "transformers"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        for file in sorted(Path(spec.origin).parent.rglob("*.py")):
            for text in DOCSTRING.findall(file.read_text(encoding="utf-8")):
                texts[inspect.cleandoc(text)] = file.stem
    return texts


def read_rows(source: str | None, kind: str) -> list[dict[str, Any]]:
    """The rows of a JSON or JSON Lines file, or of `docstrings`."""
    if source is None:
        if kind == "text":
            texts = [*docstrings()]
            return [{"text": f"{one}\n\n{next_one}"} for one, next_one in zip(texts[::2], texts[1::2], strict=False)]
        return [{"instruction": f"Explain a part of {name}.", "output": text} for text, name in docstrings().items()]
    text = Path(source).read_text()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return list(rows)


def write_rows(source: str | None, target: Path, megabytes: int, kind: str) -> None:
    """Repeat the rows in random order, each time with another number, until the target has so many megabytes."""
    rows, rng, size = read_rows(source, kind), random.Random(0), 0
    with target.open("w") as file:
        while size < megabytes * 1e6:
            row = rng.choice(rows)
            number = rng.randrange(10**6)
            if kind == "text":
                line = json.dumps({"text": f"{number} {row.get('text') or row['output']}"})
            else:
                question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
                turns = [
                    {"role": "user", "content": f"{question} ({number})"},
                    {"role": "assistant", "content": row["output"]},
                ]
                line = json.dumps({"messages": turns})
            size += file.write(line + "\n")


def save_tokenizer(folder: Path, vocab: str | None, merges: str | None) -> None:
    """Save a byte-level tokenizer with the ChatML template: made of these files, or trained on `docstrings`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    if vocab and merges:
        vocabulary = json.loads(Path(vocab).read_text())
        lines = [line.split(" ") for line in Path(merges).read_text().splitlines()[1:]]
        bpe = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in lines if left + right in vocabulary]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if not (vocab and merges):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=50_000, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(docstrings(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)  # type: ignore[no-untyped-call]  # transformers has no type here
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.chat_template = CHATML.read_text()
    tokenizer.save_pretrained(folder)
