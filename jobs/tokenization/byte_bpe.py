"""Tokenizes with tiktoken like a byte-level BPE tokenizer of `tokenizers`: the same tokens, several times as fast.

Whatever is not known to give the same tokens is refused: a tokenizer by its parts, a text by its characters.
bpe_ranks.py explains why the merges are the same, split_patterns.py why the splitting is the same. This file handles added
tokens, Unicode normalization and the loss mask.

The stages of one call, for many texts at once (a call per text takes as long as the tokens themselves):
1. Join the texts with SEPARATOR.
2. Replace each added token (`<|im_end|>`) by SEPARATOR too, and remember in order which token each SEPARATOR stands for.
3. Tokenize the joined text with tiktoken. Its tokens are ranks, see bpe_ranks.py.
4. Put the added tokens back and drop the separators between texts.
5. The lengths of the tokens in bytes give their ends, and so the loss mask and the tokens of each text.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from jobs.tokenization import bpe_ranks
from jobs.tokenization.offsets import MaskedText, Span, TokenizedText, Unsupported
from jobs.tokenization.split_patterns import (
    CUT,
    DIGITS,
    LOOKAHEAD,
    RESERVED,
    SEPARATOR,
    cut_runs,
    kinds_of_units,
    read_pattern,
)

CHARACTER_CLASSES = re.compile(r"\\[pP]\{\w+\}|\\[sSd]")
BLOCKS = ((0, 0x3400), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xF900, 0x20000), (0x2A6DE, 0x2A700), (0x2EBE0, 0x31350))
CHANGING = "".join(chr(point) for block in (*BLOCKS, (0x323AF, 0x33480), (0xE0000, 0xE0200)) for point in range(*block))
"""All characters that versions of Unicode may disagree on: without the ideographs and syllables that have been letters for
long, and without unused planes."""


class TiktokenBackend:
    """Tokenizes texts with tiktoken. Raises Unsupported for a tokenizer whose tokens it cannot guarantee to reproduce."""

    name = "tiktoken"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            from tiktoken import Encoding
        except ImportError as error:
            raise Unsupported("tiktoken is not installed") from error
        if not tokenizer.is_fast or tokenizer.split_special_tokens:
            raise Unsupported("the tokenizer is not a fast one, or splits special tokens")
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        pattern = read_pattern(rules["pre_tokenizer"])
        self._nfc = _normalizes(rules["normalizer"])
        # A class and its complement (`\s` and `\S`) are ambiguous for the same characters, so one of the two is enough.
        classes = frozenset(name[:2].lower() + name[2:] for name in CHARACTER_CLASSES.findall(pattern))
        self._ambiguous = _ambiguous_characters(classes, pattern == DIGITS, self._nfc)
        self._unit_kinds = kinds_of_units(pattern)
        ids, ranks = bpe_ranks.mergeable_ranks(rules["model"])
        # Ranks: first those of the BPE model, then one for each added token, then SEPARATOR and CUT.
        self._added_patterns, added = _added_tokens(rules["added_tokens"], self._nfc)
        self._separator = len(ids) + len(added)
        self._rank_of_added = {text: len(ids) + number for number, text in enumerate(added)}
        self._rank_of_added[SEPARATOR] = self._separator
        self._ids = np.array([*ids, *added.values()], dtype=np.int32)
        self._byte_lengths = np.zeros(len(self._ids), dtype=np.int64)
        self._byte_lengths[list(ranks.values())] = [len(text) for text in ranks]
        self._byte_lengths[len(ids) :] = [len(text.encode()) for text in added]
        self._prefix, self._suffix = (np.array(ids, dtype=np.int32) for ids in _special_tokens_around(tokenizer))
        self._adds_none = not len(self._prefix) + len(self._suffix)
        try:
            self._encode = Encoding(
                "muster",
                pat_str=pattern if self._unit_kinds is None else pattern.replace(LOOKAHEAD, ""),
                mergeable_ranks=ranks,
                special_tokens={SEPARATOR: self._separator, CUT: self._separator + 1},
            )._core_bpe.encode_to_tiktoken_buffer
        except ValueError as error:
            raise Unsupported("tiktoken cannot compile the tokenizer's split pattern") from error

    def __call__(self, texts: Sequence[MaskedText]) -> list[TokenizedText | None]:
        """Tokenize all texts in one call. None for a text that needs another way."""
        supported = [number for number, text in enumerate(texts) if self._supports(text.text)]
        try:
            tokenized = self._tokenize([texts[number] for number in supported])
            by_number = dict(zip(supported, tokenized, strict=True))
        except Exception:  # One text is the cause. Each alone: then only that one fails.
            return [None] if len(texts) == 1 else [result for text in texts for result in self([text])]
        return [by_number.get(number) for number in range(len(texts))]

    def _supports(self, text: str) -> bool:
        """Whether the text has no character that versions of Unicode disagree on, needs no normalization, and has no
        reserved character."""
        if text.isascii():
            return True
        if (self._ambiguous and self._ambiguous.search(text)) or SEPARATOR in text or CUT in text:
            return False
        return not self._nfc or unicodedata.is_normalized("NFC", text)

    def _tokenize(self, texts: list[MaskedText]) -> Iterator[TokenizedText]:
        ranks = self._ranks([text.text for text in texts])
        token_ends = np.add.accumulate(self._byte_lengths[ranks])
        spans, excluded, text_ends = _joined_spans(texts)
        if text_ends[-1] != (token_ends[-1] if len(token_ends) else 0):
            raise Unsupported("the tokenizer's split pattern does not match all of a text")
        ids = self._ids[ranks]
        trained = (_overlaps(token_ends, spans) & ~_overlaps(token_ends, excluded)).view(np.uint8)
        stops = token_ends.searchsorted(text_ends, "right").tolist()
        for text, start, stop in zip(texts, stops, stops[1:], strict=False):
            yield self._with_special_tokens(text, ids[start:stop], trained[start:stop])

    def _with_special_tokens(
        self, text: MaskedText, ids: NDArray[np.int32], trained: NDArray[np.uint8]
    ) -> TokenizedText:
        if not text.add_special_tokens or self._adds_none:
            return TokenizedText(ids, trained, not text.text)
        before, after = np.zeros_like(self._prefix, np.uint8), np.zeros_like(self._suffix, np.uint8)
        ids = np.concatenate([self._prefix, ids, self._suffix])
        trained = np.concatenate([before, trained, after])
        return TokenizedText(ids, trained, len(self._suffix) > 0 or not text.text)

    def _ranks(self, texts: list[str]) -> NDArray[np.intp]:
        """Ranks of all tokens of all texts.

        Added tokens are cut out before tiktoken runs, as tokenizers does. tiktoken's own special tokens are slow when there are
        many, and it does not prefer the longest.
        """
        joined = SEPARATOR.join(texts)
        replaced: Iterator[str] = repeat(SEPARATOR)  # what each SEPARATOR in `joined` stands for, in order
        for pattern in self._added_patterns:
            parts = pattern.split(joined)  # text, match, text, match, ..., text
            replaced = iter([next(replaced) if match == SEPARATOR else match for match in parts[1::2]])
            joined = SEPARATOR.join(parts[::2])
        if self._unit_kinds is not None:
            joined = cut_runs(joined, self._unit_kinds)
        buffer = np.frombuffer(self._encode(joined, RESERVED), np.uint32)
        ranks = buffer.astype(np.intp)  # numpy indexes fastest with this type
        separators = np.flatnonzero(ranks == self._separator)
        ranks[separators] = np.fromiter(map(self._rank_of_added.__getitem__, replaced), np.intp, len(separators))
        return ranks[ranks < self._separator]  # drops SEPARATOR between texts, and CUT


def _joined_spans(texts: list[MaskedText]) -> tuple[list[Span], list[Span], list[int]]:
    """In bytes of all texts joined: (trained spans, excluded spans, 0 and the end of each text)."""
    spans: list[Span] = []
    excluded: list[Span] = []
    text_ends = [0]
    for text in texts:
        in_bytes = _in_bytes(text.text, [*text.trained_spans, *text.excluded_spans, (0, len(text.text))])
        shifted = [(text_ends[-1] + start, text_ends[-1] + end) for start, end in in_bytes]
        count = len(text.trained_spans)
        spans += shifted[:count]
        excluded += shifted[count:-1]
        text_ends.append(shifted[-1][1])
    return spans, excluded, text_ends


def _overlaps(token_ends: NDArray[np.int64], spans: list[Span]) -> NDArray[np.bool_]:
    """Whether each token holds a part of a span. As `offsets.mark_tokens`, for tokens without gaps, given by their ends.

    Adds 1 at the first token of each span and subtracts 1 after its last: the running sum is the number of spans at a token.
    """
    starts, stops = np.array([span for span in spans if span[0] < span[1]], dtype=np.int64).reshape(-1, 2).T
    steps = np.zeros(len(token_ends) + 1, dtype=np.int32)
    np.add.at(steps, token_ends.searchsorted(starts, "right"), 1)
    np.subtract.at(steps, token_ends.searchsorted(stops) + 1, 1)
    return np.add.accumulate(steps[:-1]) > 0


def _in_bytes(text: str, spans: list[Span]) -> list[Span]:
    """Spans of characters as spans of UTF-8 bytes.

    A token with a part of a character's bytes holds the character, so the loss mask is the same as by characters.
    """
    if text.isascii():
        return spans
    character, byte, byte_of_character = 0, 0, {}
    for bound in sorted({bound for span in spans for bound in span}):
        byte += len(text[character:bound].encode())
        character, byte_of_character[bound] = bound, byte
    return [(byte_of_character[start], byte_of_character[end]) for start, end in spans]


def _normalizes(normalizer: dict[str, Any] | None) -> bool:
    """Whether the tokenizer normalizes texts to NFC. Raises Unsupported for any other normalizer."""
    if normalizer is None:
        return False
    if normalizer != {"type": "NFC"}:
        raise Unsupported(f"its normalizer changes texts ({normalizer['type']})")
    return True


def _added_tokens(tokens: list[dict[str, Any]], nfc: bool) -> tuple[list[re.Pattern[str]], dict[str, int]]:
    """(patterns to split a text by in turn, id of each added token).

    As tokenizers does, first the tokens with `normalized: false`, then the others. The longest token wins.
    """
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens):
        raise Unsupported("its added tokens take whitespace with them or match whole words only")
    if nfc and not all(unicodedata.is_normalized("NFC", token["content"]) for token in tokens):
        raise Unsupported("its added tokens are not normalized")
    if any(character in token["content"] for character in RESERVED for token in tokens):
        raise Unsupported("its added tokens contain a character that Muster reserves")
    patterns = []
    for normalized in (False, True):
        texts = [token["content"] for token in tokens if token["normalized"] is normalized and token["content"]]
        if texts:
            longest_first = sorted(texts, key=len, reverse=True)
            patterns.append(re.compile(f"({'|'.join(map(re.escape, (SEPARATOR, *longest_first)))})"))
    return patterns, {token["content"]: token["id"] for token in tokens if token["content"]}


@lru_cache
def _ambiguous_characters(classes: frozenset[str], digits: bool, nfc: bool) -> re.Pattern[str] | None:
    """Characters that tokenizers and tiktoken classify by different versions of Unicode, or that Python cannot normalize.

    classes: the character classes of the split pattern, e.g. `\\p{L}`. digits: whether tokenizers splits digits itself.
    """
    ambiguous: set[str] = set()
    for name in classes:
        outside = normalizers.Replace(Regex(name), "").normalize_str(CHANGING)
        outside_in_tiktoken = _tiktoken_matches(f"[^{name}]", CHANGING)
        if outside != outside_in_tiktoken:
            ambiguous |= {*outside} ^ {*outside_in_tiktoken}
    if digits:
        parts = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str("a".join(CHANGING))
        split_off = {part for part, _ in parts if len(part) == 1 and part != "a"}
        ambiguous |= split_off ^ {*_tiktoken_matches(r"\p{N}", CHANGING)}
    if nfc:  # Cn: not assigned in Python's version of Unicode
        ambiguous |= {character for character in CHANGING if unicodedata.category(character) == "Cn"}
    return re.compile(f"[{''.join(map(re.escape, sorted(ambiguous)))}]") if ambiguous else None


def _tiktoken_matches(pattern: str, text: str) -> str:
    """The characters of a text that tiktoken's regex engine matches: it makes tokens of matches and drops the rest."""
    from tiktoken._tiktoken import CoreBPE

    core = CoreBPE({bytes([byte]): byte for byte in range(256)}, {SEPARATOR: 256}, pattern)
    buffer = core.encode_to_tiktoken_buffer(text, frozenset())
    return np.frombuffer(buffer, np.uint32).astype(np.uint8).tobytes().decode()


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that `add_special_tokens` puts before and after a text."""
    added = tokenizer.encode("", add_special_tokens=True)
    possible = set(range(len(added) + 1))  # how many of them may stand before the text
    for text in ("a", "b c"):
        plain, full = (tokenizer.encode(text, add_special_tokens=special) for special in (False, True))
        possible = {count for count in possible if added[:count] + plain + added[count:] == full}
    if len(possible) != 1:
        raise Unsupported("the special tokens that it adds depend on the text")
    count = possible.pop()
    return added[:count], added[count:]
