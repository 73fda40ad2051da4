"""Turns stretches of characters into tokens, exactly, whatever the tokenizer does with blanks."""

from bisect import bisect_left, bisect_right
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of a text."""


def tokenise(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[Span]]:
    """(ids, the characters of each): without gaps, rising, and empty for tokens that no text stands for.

    Byte-level tokenizers such as Llama 3's cut blanks off a token's offsets, so a token of blanks has none: they are given back.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer gives no character offsets: use the fast one, with a tokenizer.json")
    found = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    bounds: list[Span] = []
    reached = 0
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if start > reached:
            start = max(reached, start - _leading_blanks(token, tokenizer))
            if bounds:
                bounds[-1] = (bounds[-1][0], start)
        elif end < reached:
            start = end = reached
        bounds.append((start, end))
        reached = end
    return list(found["input_ids"]), bounds


@lru_cache(maxsize=1 << 18)
def _leading_blanks(token: int, tokenizer: PreTrainedTokenizerBase) -> int:
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return len(text) - len(text.lstrip())


def mark(bounds: list[Span], spans: list[Span], trained: list[int], *, value: int = 1) -> list[int]:
    """Set the tokens that hold any character of the spans."""
    starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
    for start, end in spans:
        if start == end:
            continue
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        trained[first:last] = [value] * (last - first)
    return trained
