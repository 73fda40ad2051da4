"""Maps characters of a text to tokens exactly, also where the tokenizer's offsets leave out whitespace."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class MaskedText(NamedTuple):
    """A text to tokenize, with the characters to train on."""

    text: str
    trained_spans: list[Span]
    excluded_spans: list[Span]
    """Parts of the trained spans that are not trained on after all."""
    add_special_tokens: bool
    """Whether the tokenizer adds its special tokens around the text."""


class TokenizedText(NamedTuple):
    """What a tokenizer backend returns for a MaskedText."""

    ids: NDArray[np.int32]
    trained: NDArray[np.uint8]
    """1 for each token that holds at least one character to train on."""
    last_is_added: bool
    """Whether the tokenizer added the last token, so that no character of the text belongs to it."""


class Unsupported(Exception):
    """A fast encoder cannot guarantee the result of `reference.encode`. Its message gives the reason."""


def tokenize_with_spans(
    text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> tuple[list[int], list[Span]]:
    """Tokenize a text. Returns (ids, the characters of each token).

    The spans rise, and leave no gap but around added tokens that take blanks. A token that the tokenizer added gets an empty
    span. Raises ValueError for a tokenizer without offsets (a slow one).
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "the tokenizer gives no character offsets: use a fast tokenizer, one whose folder has a tokenizer.json"
        )
    with panics_as_errors(text):
        encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    ids = list(encoding["input_ids"])
    return ids, close_gaps(ids, encoding["offset_mapping"], text, tokenizer)


@contextmanager
def panics_as_errors(text: str) -> Iterator[None]:
    """Raise ValueError where the library `tokenizers` panics, because no `except Exception` catches that.

    It does on ten million blanks in sequence: its engine for regular expressions gives up.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class of the library that cannot be imported
            raise
        message = f"the tokenizer fails on a text of {len(text):,} characters ({error}): split the text, or shorten its blanks"
        raise ValueError(message) from error


def close_gaps(ids: list[int], offsets: list[Span], text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The characters of each token, including the whitespace that its offsets leave out, but without blanks around it that an
    added token takes.

    Byte-level tokenizers with `trim_offsets`, such as Llama 3's, cut leading whitespace off a token's offsets. A token of
    whitespace alone then has empty offsets.
    """
    spans: list[Span] = []
    covered = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        if start > covered:
            # A gap before this token: its own leading whitespace is given back to it, the rest to the token before.
            start -= _trimmed_length(_leading_whitespace(token, tokenizer), text[covered:start])
            if spans:
                spans[-1] = (spans[-1][0], start)
        elif end < covered:
            start = end = covered
        spans.append((start, end))
        covered = end
    if covered != len(text):
        spans = _cover_end(ids, spans, len(text), set(tokenizer.all_special_ids))
    greedy = _greedy_tokens(tokenizer, len(tokenizer))
    return _without_blanks(ids, spans, text, greedy) if greedy and not greedy.keys().isdisjoint(ids) else spans


@lru_cache(maxsize=4)
def _greedy_tokens(tokenizer: PreTrainedTokenizerBase, _size: int) -> dict[int, str]:
    """Added tokens that take the blanks around them (`lstrip`, `rstrip`), as Phi-4's do: the text of each id.

    _size: number of tokens. It is part of the cache key because tokens may be added later.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {number: token.content for number, token in added if token.lstrip or token.rstrip}


def _without_blanks(ids: list[int], spans: list[Span], text: str, greedy: dict[int, str]) -> list[Span]:
    """The spans, without the blanks that such tokens take: those are a part of the answer, but the token is not."""
    shrunk = []
    for token, (start, end) in zip(ids, spans, strict=True):
        own = text.find(greedy[token], start, end) if token in greedy else -1
        shrunk.append((start, end) if own < 0 else (own, own + len(greedy[token])))
    return shrunk


def _cover_end(ids: list[int], spans: list[Span], length: int, special: set[int]) -> list[Span]:
    """Give trailing whitespace to the last token of the text. Special tokens added after it get an empty span at the end."""
    count = len(spans)
    while count and spans[count - 1][0] == spans[count - 1][1] and ids[count - 1] in special:
        count -= 1
    last = [(start, length) for start, _ in spans[:count][-1:]]
    return [*spans[:count][:-1], *last, *[(length, length)] * (len(spans) - count)]


def _trimmed_length(whitespace: str, gap: str) -> int:
    """How many of a token's leading whitespace characters lie in the gap before its offsets.

    tokenizers trims spaces from offsets but not line ends, so only a part may be missing.
    """
    sizes = range(min(len(whitespace), len(gap)), 0, -1)
    return next((size for size in sizes if gap.endswith(whitespace[:size])), 0)


@lru_cache(maxsize=1 << 18)
def _leading_whitespace(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return text[: len(text) - len(text.lstrip())]


def mark_tokens(token_spans: list[Span], spans: list[Span], trained: list[int], *, value: int = 1) -> list[int]:
    """Set `trained` to `value` for each token that holds at least one character of `spans`. Returns the same list."""
    starts, ends = [start for start, _ in token_spans], [end for _, end in token_spans]
    for start, end in spans:
        if start == end:
            continue
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        trained[first:last] = [value] * (last - first)
    return trained
