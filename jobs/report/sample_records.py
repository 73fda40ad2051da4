"""Writes RUN/data/preview.jsonl: samples as text with the character ranges that are trained, for programs to read."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.data.token_dataset import TokenDataset
from jobs.report.token_view import REPLACEMENT_CHARACTER, Decoder, LocationOf

ALL_OF_ROWS = 100
"""All samples of a set with up to so many rows are written."""
MOST_SAMPLES = 1000
"""Samples of such a set that are written at most: its rows can be split into many."""
FIRST, RANDOM = 8, {"train": 8, "validation": 4}
"""Samples of a larger set that are written."""
SAMPLE_CHARACTERS, ALL_CHARACTERS, LATER_CHARACTERS = 1_000_000, 4_000_000, 10_000
"""Longest text of a sample. Once all texts together are longer than ALL_CHARACTERS, the rest get LATER_CHARACTERS each."""
PREFIX_TOKENS = 200_000
"""Tokens that are decoded at most to place the borders of a sample that has a border inside a character. If that is not enough,
its text is put together from single tokens, which can differ where bytes belong to no character."""
ESCAPED = re.compile("[\\x85\u2028\u2029\ud800-\udfff]")
"""Characters that some programs take for line ends, and those of file names that are not UTF-8."""
BYTES_OF_CHARACTER = 4
"""Most bytes of a character in UTF-8, so most tokens that only have a part of it."""

Span = tuple[int, int, bool]
"""(begin, end, whether it is trained) in characters of a text."""


@dataclass(frozen=True)
class FoundRow:
    """A row that a gate found."""

    gate: str
    location: str
    detail: str
    """Why; may be empty."""
    samples: Sequence[int]
    """The numbers of its samples; empty if it was left out."""


@dataclass(frozen=True)
class SetSamples:
    """The samples of one set, and what the gates found in it."""

    name: str
    rows: int
    """Rows that were read, with those that were left out."""
    samples: TokenDataset
    """The samples of this set and perhaps of others."""
    numbers: range
    """Numbers of this set's samples in `samples`."""
    location_of: LocationOf
    chosen: Mapping[str, NDArray[np.int64]]
    """The numbers that each split (train, validation) uses."""
    found: Sequence[FoundRow]


def render_jsonl(sets: Iterable[SetSamples], decoder: Decoder, seed: int) -> str:
    """The text of preview.jsonl: one JSON object in each line. docs/data.md describes its keys."""
    lines, characters = [], 0
    for one in sets:
        for record, number in _records(one, seed):
            if number is not None:
                limit = SAMPLE_CHARACTERS if characters < ALL_CHARACTERS else LATER_CHARACTERS
                record |= sample_fields(decoder, *one.samples[number], limit)
                characters += len(record["text"])
            line = json.dumps(record, ensure_ascii=False)
            lines.append(ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", line))
    return "".join(f"{line}\n" for line in lines)


def _records(one: SetSamples, seed: int) -> Iterator[tuple[dict[str, Any], int | None]]:
    """(record without its text, number of the sample or None) of each sample and row to show."""
    numbers = np.arange(one.numbers.start, one.numbers.stop)
    inside = {
        split: chosen[(chosen >= one.numbers.start) & (chosen < one.numbers.stop)]
        for split, chosen in one.chosen.items()
    }

    def sample(number: int, why: str) -> tuple[dict[str, Any], int]:
        split = next((name for name, chosen in inside.items() if (chosen == number).any()), None)
        record = {"set": one.name, "split": split, "why": why, "source": one.location_of(number)}
        return record, number

    small = one.rows <= ALL_OF_ROWS
    for number in numbers[: MOST_SAMPLES if small else FIRST].tolist():
        yield sample(number, "first")
    for split, chosen in {} if small else inside.items():
        different = np.unique(chosen)
        drawn = np.random.default_rng(seed).permutation(different)[: RANDOM[split]]
        for number in np.sort(drawn).tolist():
            yield sample(number, "random")
    for row in one.found:
        why = f"gate: {row.gate}"
        for number in row.samples:
            yield sample(number, why)
        if not row.samples:
            yield {"set": one.name, "why": why, "source": row.location, "error": row.detail}, None


def sample_fields(decoder: Decoder, ids: NDArray[np.int32], trained: NDArray[np.uint8], limit: int) -> dict[str, Any]:
    """`text`, `spans` and `tokens` of a sample, and `cut` if its text is longer than `limit` characters."""
    text, spans = text_and_spans(
        decoder, ids[:limit], trained[:limit]
    )  # so many tokens have at least about as much text
    if len(ids) > limit:
        text = text.rstrip(REPLACEMENT_CHARACTER)  # the first tokens of a character
    cut = len(ids) > limit or len(text) > limit
    text = text[:limit]
    shown = [[begin, min(end, len(text)), flag] for begin, end, flag in spans if begin < len(text)]
    return {"text": text, "spans": shown, "tokens": len(ids)} | ({"cut": True} if cut else {})


def text_and_spans(decoder: Decoder, ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> tuple[str, list[Span]]:
    """The decoded text, and its trained and untrained spans: neighbors, not empty, in turns trained and not.

    A character whose tokens are partly trained belongs to the span of its last token.
    """
    tokens = ids.tolist()
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    runs = [(begin, end) for begin, end in pairwise(edges) if begin < end]
    pieces = [decoder.plain(tokens[begin:end]) if begin else decoder.whole(tokens[:end]) for begin, end in runs]
    text, ends = decoder.whole(tokens), list(accumulate(map(len, pieces)))
    if "".join(pieces) != text:
        if BYTES_OF_CHARACTER * len(runs) * len(tokens) <= PREFIX_TOKENS:
            ends = [*accumulate((_border(decoder, tokens[:end], text) for _, end in runs[:-1]), max), len(text)]
        else:
            return _from_groups(decoder, tokens, trained.tolist())
    spans: list[Span] = []
    for (begin, _), start, end in zip(runs, [0, *ends], ends, strict=False):
        _extend(spans, start, end, bool(trained[begin]))
    return text, spans


def _extend(spans: list[Span], start: int, end: int, flag: bool) -> None:
    """Add a span; it becomes part of the last one if that has the same flag."""
    if start < end:
        if spans and spans[-1][2] == flag:
            start = spans.pop()[0]
        spans.append((start, end, flag))


def _from_groups(decoder: Decoder, tokens: list[int], trained: list[int]) -> tuple[str, list[Span]]:
    """Text and spans from single tokens, and from the few tokens that make up one character."""
    pieces: list[str] = []
    spans: list[Span] = []
    token = length = 0
    for ids, text in decoder.groups(tokens):
        pieces.append(decoder.plain(ids) if text.startswith("[") else text)  # a token without text is shown as [its id]
        token += len(ids)
        _extend(spans, length, length + len(pieces[-1]), bool(trained[token - 1]))
        length += len(pieces[-1])
    return "".join(pieces), spans


def _border(decoder: Decoder, tokens: list[int], text: str) -> int:
    """How many characters of `text` these first tokens of it have whole.

    Tokens that end inside a character can make the characters before it unreadable too, so fewer of them are tried as well.
    """
    ends = range(max(0, len(tokens) - BYTES_OF_CHARACTER + 1), len(tokens) + 1)
    return max(len(os.path.commonprefix([decoder.whole(tokens[:end]), text])) for end in ends)
