"""Tokenises with tiktoken what a byte-level BPE tokenizer would, token for token, several times as fast.

What is not known to come out the same is refused: a tokenizer by its parts, a text by its characters. merges.py says why the
merges are the same; here it is the splitting, the added tokens, the normal form and the marks.
"""

import json
import re
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from jobs import merges
from jobs.spans import Span, Unfit

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel(use_regex=True)` splits by."""
DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same after `Digits(individual_digits=True)`, which ends a text before and after every digit."""
SYNTAX = re.compile(
    r"""\(\?(?:i?:|<?[!=]) | \((?!\?) | \|                       # groups, looks, alternatives
    | (?: \\[pP]\{\w+\} | \\[sSrntd] | \\\W                       # classes and escapes
    | \[\^?(?:\\[pP]\{\w+\}|\\[sSrntd]|\\\W|(?!--)[^][\\&~])+\]   # sets, without sets in them
    | [^][\\(){}|.^$*+?] | \)                                     # letters, and a group's end
    ) (?: (?:[*+?]|\{\d+(?:,\d*)?\}) (?![*+?]) )?""",
    re.VERBOSE,
)
"""The part of a regular expression that Oniguruma, which tokenizers uses, and tiktoken's engine read alike: the first ends a
line at `$`, and repeats where the second is possessive at `{1,3}+`."""
CLASSES = re.compile(r"\\[pP]\{\w+\}|\\[sSd]")
BLOCKS = ((0, 0x3400), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xF900, 0x20000), (0x2A6DE, 0x2A700), (0x2EBE0, 0x31350))
CHANGING = "".join(chr(point) for block in (*BLOCKS, (0x323AF, 0x33480), (0xE0000, 0xE0200)) for point in range(*block))
"""All but the ideographs and syllables that have been letters for long, and planes that nobody uses."""
NOTHING: frozenset[str] = frozenset()
UNUSED = "<no special token: they are cut out before>"


class ByteLevel:
    """Texts to tokens. Raises Unfit, at once for a tokenizer, and in use for a text, that it cannot promise to do alike."""

    name = "tiktoken"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            from tiktoken import Encoding
        except ImportError as error:
            raise Unfit("tiktoken is not installed") from error
        if not tokenizer.is_fast or tokenizer.split_special_tokens:
            raise Unfit("the tokenizer is not the plain fast one")
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        pattern = _pattern(whole["pre_tokenizer"])
        self._composes = _composes(whole["normalizer"])
        self._odd = _odd(frozenset(CLASSES.findall(pattern)), pattern == DIGITS, self._composes)
        ids, ranks = merges.ranks(whole["model"])
        self._patterns, added = _added(whole["added_tokens"], self._composes)
        self._firsts = {text[0] for text in added}
        self._packed = {text: np.uint32(len(ids) + number).tobytes() for number, text in enumerate(added)}
        self._ids = np.array([*ids, *added.values()], dtype=np.int32)
        self._lengths = np.zeros(len(self._ids), dtype=np.int64)
        self._lengths[list(ranks.values())] = [len(text) for text in ranks]
        self._lengths[len(ids) :] = [len(text.encode()) for text in added]
        self._before, self._after = (np.array(ids, dtype=np.int32) for ids in _around(tokenizer))
        self._bare = not len(self._before) + len(self._after)
        try:
            self._core = Encoding(
                "muster", pat_str=pattern, mergeable_ranks=ranks, special_tokens={UNUSED: len(self._ids)}
            )._core_bpe.encode_to_tiktoken_buffer
        except ValueError as error:
            raise Unfit("tiktoken refuses the tokenizer's pattern") from error

    def __call__(
        self, text: str, spans: list[Span], cut: list[Span], *, add_special_tokens: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8], bool]:
        """(ids, 1 where a token holds a character of the spans and none of `cut`, whether the last token is not in the text)."""
        size = len(text)
        if not text.isascii():
            self._check(text)
            spans, cut, size = _in_bytes(text, spans), _in_bytes(text, cut), len(text.encode())
        ranks = np.frombuffer(self._buffer(text), np.uint32).astype(
            np.intp
        )  # the type that numpy looks up with soonest
        ends = np.add.accumulate(self._lengths[ranks])
        if size != (ends[-1] if len(ends) else 0):
            raise Unfit("the tokenizer's pattern leaves out a part of the text")
        ids = self._ids[ranks]
        trained = np.zeros(len(ids), dtype=np.uint8)
        _mark(ends, spans, trained, 1)
        _mark(ends, cut, trained, 0)
        if not add_special_tokens or self._bare:
            return ids, trained, not text
        ids = np.concatenate([self._before, ids, self._after])
        trained = np.concatenate([np.zeros_like(self._before, np.uint8), trained, np.zeros_like(self._after, np.uint8)])
        return ids, trained, len(self._after) > 0 or not text

    def _check(self, text: str) -> None:
        if self._odd and self._odd.search(text):
            raise Unfit("the text has characters that this machine's versions of Unicode disagree on")
        if self._composes and not unicodedata.is_normalized("NFC", text):
            raise Unfit("the text is not in the normal form")

    def _buffer(self, text: str) -> bytes:
        """Ranks, four bytes each."""
        if any(first in text for first in self._firsts):
            return b"".join(self._pieces(text, self._patterns))
        return self._core(text, NOTHING)

    def _pieces(self, text: str, patterns: list[re.Pattern[str]]) -> list[bytes]:
        """Added tokens are cut out first, as tokenizers does: tiktoken's own way is slow at many, and knows no longest one."""
        if not patterns:
            return [self._core(text, NOTHING)]
        found = []
        for number, piece in enumerate(patterns[0].split(text)):
            if number % 2:
                found.append(self._packed[piece])
            elif piece:
                found += self._pieces(piece, patterns[1:])
        return found


def _mark(ends: NDArray[np.int64], spans: list[Span], trained: NDArray[np.uint8], value: int) -> None:
    """As `spans.mark`, for tokens without gaps of which only the ends are known."""
    for start, end in spans:
        if start < end:
            trained[ends.searchsorted(start, "right") : ends.searchsorted(end) + 1] = value


def _in_bytes(text: str, spans: list[Span]) -> list[Span]:
    """A token that holds a part of a character's bytes holds the character, so the marks are the same."""
    at, counted, found = 0, 0, {}
    for place in sorted({place for span in spans for place in span}):
        counted += len(text[at:place].encode())
        at, found[place] = place, counted
    return [(found[start], found[end]) for start, end in spans]


def _pattern(before: dict[str, Any] | None) -> str:
    """What the texts are split by, where it is one pattern."""
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before or {"type": None}]
    first, last = steps[0], steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(steps) > 2:
        raise Unfit("its texts are not split by one pattern into bytes")
    if len(steps) == 1 and last["use_regex"]:
        return GPT2
    if len(steps) == 2 and last["use_regex"] and first == {"type": "Digits", "individual_digits": True}:
        return DIGITS
    if len(steps) == 1 or last["use_regex"] or first["type"] != "Split":
        raise Unfit("its texts are not split by one pattern into bytes")
    whole = (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    pattern = first["pattern"].get("Regex", "")
    if not whole or not pattern or SYNTAX.sub("", pattern):
        raise Unfit("its texts are split by a pattern that tiktoken may read in another way")
    return pattern


def _composes(normalizer: dict[str, Any] | None) -> bool:
    if normalizer not in (None, {"type": "NFC"}):
        raise Unfit(f"its texts are changed first, by {normalizer['type']}")
    return normalizer is not None


def _added(tokens: list[dict[str, Any]], composes: bool) -> tuple[list[re.Pattern[str]], dict[str, int]]:
    """(patterns to cut by in turn, ids of all): first the tokens that are sought in the raw text, then the others."""
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens):
        raise Unfit("its added tokens take blanks or words with them")
    if composes and not all(unicodedata.is_normalized("NFC", token["content"]) for token in tokens):
        raise Unfit("its added tokens are not in the normal form")
    patterns = []
    for normalized in (False, True):
        texts = [token["content"] for token in tokens if token["normalized"] is normalized and token["content"]]
        if texts:
            longest_first = sorted(texts, key=len, reverse=True)
            patterns.append(re.compile(f"({'|'.join(map(re.escape, longest_first))})"))
    return patterns, {token["content"]: token["id"] for token in tokens if token["content"]}


@lru_cache
def _odd(classes: frozenset[str], digits: bool, composes: bool) -> re.Pattern[str] | None:
    """Characters that tokenizers and tiktoken class by other versions of Unicode, or whose normal form Python does not know."""
    odd: set[str] = set()
    for name in classes:
        others = normalizers.Replace(Regex(name), "").normalize_str(CHANGING)
        if others != (found := _found(f"[^{name}]", CHANGING)):
            odd |= {*others} ^ {*found}
    if digits:
        pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str("a".join(CHANGING))
        odd |= {piece for piece, _ in pieces if len(piece) == 1 and piece != "a"} ^ {*_found(r"\p{N}", CHANGING)}
    if composes:
        odd |= {character for character in CHANGING if unicodedata.category(character) == "Cn"}
    return re.compile(f"[{''.join(map(re.escape, sorted(odd)))}]") if odd else None


def _found(pattern: str, text: str) -> str:
    """What tiktoken finds, of which it makes tokens; it leaves out the rest."""
    from tiktoken import _tiktoken

    core = _tiktoken.CoreBPE({bytes([byte]): byte for byte in range(256)}, {UNUSED: 256}, pattern)
    found = core.encode_to_tiktoken_buffer(text, NOTHING)
    return np.frombuffer(found, np.uint32).astype(np.uint8).tobytes().decode()


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that `add_special_tokens` puts before and after a text."""
    added = tokenizer.encode("", add_special_tokens=True)
    fits = set(range(len(added) + 1))
    for text in ("a", "b c"):
        bare, whole = (tokenizer.encode(text, add_special_tokens=special) for special in (False, True))
        fits = {place for place in fits if added[:place] + bare + added[place:] == whole}
    if len(fits) != 1:
        raise Unfit("it puts other special tokens round one text than round another")
    place = fits.pop()
    return added[:place], added[place:]
