"""Turns stretches of characters into tokens, exactly, whatever the tokenizer does with blanks."""

from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of a text."""
Found = tuple[NDArray[np.int32], NDArray[np.uint8], bool]
"""(ids, 1 where a token holds a character that is learnt, whether the last token is not in the text)."""


class Text(NamedTuple):
    """A text to be made tokens of."""

    text: str
    spans: list[Span]
    """What is learnt of it."""
    cut: list[Span]
    """What is taken out of that again."""
    special: bool
    """Whether the tokenizer puts its special tokens round it."""


class Unfit(Exception):
    """A fast way cannot promise to give what `chat.encode` gives, for the reason it says."""


def tokenise(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[Span]]:
    """(ids, the characters of each): without gaps, rising, and empty for tokens that no text stands for.

    Byte-level tokenizers such as Llama 3's cut blanks off a token's offsets, so a token of blanks has none: they are given back.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer gives no character offsets: use the fast one, with a tokenizer.json")
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), whole(found["input_ids"], found["offset_mapping"], text, tokenizer)


def whole(ids: list[int], offsets: list[Span], text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The characters of each token, with the blanks that its offsets lack."""
    bounds: list[Span] = []
    reached = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start > reached:
            start -= _cut_blanks(_leading_blanks(token, tokenizer), text[reached:start])
            if bounds:
                bounds[-1] = (bounds[-1][0], start)
        elif end < reached:
            start = end = reached
        bounds.append((start, end))
        reached = end
    return bounds if reached == len(text) else _to_the_end(ids, bounds, len(text), set(tokenizer.all_special_ids))


def _to_the_end(ids: list[int], bounds: list[Span], size: int, special: set[int]) -> list[Span]:
    """The last token that text stands for has the blanks of the text's end; those put behind it stand at the very end."""
    written = len(bounds)
    while written and bounds[written - 1][0] == bounds[written - 1][1] and ids[written - 1] in special:
        written -= 1
    last = [(start, size) for start, _ in bounds[:written][-1:]]
    return [*bounds[:written][:-1], *last, *[(size, size)] * (len(bounds) - written)]


def _cut_blanks(blanks: str, gap: str) -> int:
    """How many of a token's leading blanks lie before its offsets: spaces are cut off, line ends are not."""
    return next((size for size in range(min(len(blanks), len(gap)), 0, -1) if gap.endswith(blanks[:size])), 0)


@lru_cache(maxsize=1 << 18)
def _leading_blanks(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text[: len(text) - len(text.lstrip())]


def mark(bounds: list[Span], spans: list[Span], trained: list[int], *, value: int = 1) -> list[int]:
    """Set the tokens that hold any character of the spans."""
    starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
    for start, end in spans:
        if start == end:
            continue
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        trained[first:last] = [value] * (last - first)
    return trained
