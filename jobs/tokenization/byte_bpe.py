"""Tokenises with tiktoken what a byte-level BPE tokenizer would, token for token, several times as fast.

What is not known to come out the same is refused: a tokenizer by its parts, a text by its characters. merges.py says why the
merges are the same, patterns.py why the splitting is; here it is the added tokens, the normal form and the marks.
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
from jobs.tokenization import split_patterns as patterns
from jobs.tokenization.offsets import Found, Span, Text, Unfit
from jobs.tokenization.split_patterns import CUT, DIGITS, HERE, SIGNS, parted

CLASSES = re.compile(r"\\[pP]\{\w+\}|\\[sSd]")
BLOCKS = ((0, 0x3400), (0xA000, 0xAC00), (0xD7A4, 0xD800), (0xF900, 0x20000), (0x2A6DE, 0x2A700), (0x2EBE0, 0x31350))
CHANGING = "".join(chr(point) for block in (*BLOCKS, (0x323AF, 0x33480), (0xE0000, 0xE0200)) for point in range(*block))
"""All but the ideographs and syllables that have been letters for long, and planes that nobody uses."""


class ByteLevel:
    """Texts to tokens. Raises Unfit for a tokenizer that it cannot promise to do alike."""

    name = "tiktoken"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            from tiktoken import Encoding
        except ImportError as error:
            raise Unfit("tiktoken is not installed") from error
        if not tokenizer.is_fast or tokenizer.split_special_tokens:
            raise Unfit("the tokenizer is not the plain fast one")
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        pattern = patterns.read(whole["pre_tokenizer"])
        self._composes = _composes(whole["normalizer"])
        self._odd = _odd(frozenset(CLASSES.findall(pattern)), pattern == DIGITS, self._composes)
        ids, ranks = bpe_ranks.ranks(whole["model"])
        self._patterns, added = _added(whole["added_tokens"], self._composes)
        self._sign = len(ids) + len(added)
        self._added = {text: len(ids) + number for number, text in enumerate(added)} | {HERE: self._sign}
        self._runs = patterns.runs(pattern)
        self._ids = np.array([*ids, *added.values()], dtype=np.int32)
        self._lengths = np.zeros(len(self._ids), dtype=np.int64)
        self._lengths[list(ranks.values())] = [len(text) for text in ranks]
        self._lengths[len(ids) :] = [len(text.encode()) for text in added]
        self._before, self._after = (np.array(ids, dtype=np.int32) for ids in _around(tokenizer))
        self._bare = not len(self._before) + len(self._after)
        try:
            self._core = Encoding(
                "muster",
                pat_str=pattern if self._runs is None else pattern.replace(patterns.AHEAD, ""),
                mergeable_ranks=ranks,
                special_tokens={HERE: self._sign, CUT: self._sign + 1},
            )._core_bpe.encode_to_tiktoken_buffer
        except ValueError as error:
            raise Unfit("tiktoken refuses the tokenizer's pattern") from error

    def __call__(self, texts: Sequence[Text]) -> list[Found | None]:
        """All at once, because a call for each takes as long as the tokens; None for a text that another way must do."""
        fit = [number for number, text in enumerate(texts) if self._fits(text.text)]
        try:
            made = dict(zip(fit, self._together([texts[number] for number in fit]), strict=True))
        except Exception:  # one of them: alone, it fails alone
            return [None] if len(texts) == 1 else [found for text in texts for found in self([text])]
        return [made.get(number) for number in range(len(texts))]

    def _fits(self, text: str) -> bool:
        """Whether the versions of Unicode on this machine agree on its characters, it is in the normal form and holds no sign."""
        if text.isascii():
            return True
        if (self._odd and self._odd.search(text)) or HERE in text or CUT in text:
            return False
        return not self._composes or unicodedata.is_normalized("NFC", text)

    def _together(self, texts: list[Text]) -> Iterator[Found]:
        ranks = self._ranks([text.text for text in texts])
        ends = np.add.accumulate(self._lengths[ranks])
        spans: list[Span] = []
        cut: list[Span] = []
        bounds = [0]
        for text in texts:
            places = _in_bytes(text.text, [*text.spans, *text.cut, (0, len(text.text))])
            placed = [(bounds[-1] + start, bounds[-1] + end) for start, end in places]
            spans += placed[: len(text.spans)]
            cut += placed[len(text.spans) : -1]
            bounds.append(placed[-1][1])
        if bounds[-1] != (ends[-1] if len(ends) else 0):
            raise Unfit("the tokenizer's pattern leaves out a part of a text")
        ids, trained = self._ids[ranks], (_held(ends, spans) & ~_held(ends, cut)).view(np.uint8)
        stops = ends.searchsorted(bounds, "right").tolist()
        for text, start, stop in zip(texts, stops, stops[1:], strict=False):
            yield self._surrounded(text, ids[start:stop], trained[start:stop])

    def _surrounded(self, text: Text, ids: NDArray[np.int32], trained: NDArray[np.uint8]) -> Found:
        if not text.special or self._bare:
            return ids, trained, not text.text
        ids = np.concatenate([self._before, ids, self._after])
        trained = np.concatenate([np.zeros_like(self._before, np.uint8), trained, np.zeros_like(self._after, np.uint8)])
        return ids, trained, len(self._after) > 0 or not text.text

    def _ranks(self, texts: list[str]) -> NDArray[np.intp]:
        """Of all tokens. Added tokens are cut out first, as tokenizers does: tiktoken's own way is slow at many, and knows
        no longest one."""
        whole = HERE.join(texts)
        stand: Iterator[str] = repeat(HERE)  # what stands at each sign
        for pattern in self._patterns:
            pieces = pattern.split(whole)
            stand = iter([next(stand) if piece == HERE else piece for piece in pieces[1::2]])
            whole = HERE.join(pieces[::2])
        if self._runs is not None:
            whole = parted(whole, self._runs)
        made = np.frombuffer(self._core(whole, SIGNS), np.uint32)
        ranks = made.astype(np.intp)  # numpy looks up by that type soonest
        signs = np.flatnonzero(ranks == self._sign)
        ranks[signs] = np.fromiter(map(self._added.__getitem__, stand), np.intp, len(signs))
        return ranks[ranks < self._sign]


def _held(ends: NDArray[np.int64], spans: list[Span]) -> NDArray[np.bool_]:
    """As `spans.mark`, for tokens without gaps of which only the ends are known."""
    starts, stops = np.array([span for span in spans if span[0] < span[1]], dtype=np.int64).reshape(-1, 2).T
    steps = np.zeros(len(ends) + 1, dtype=np.int32)
    np.add.at(steps, ends.searchsorted(starts, "right"), 1)
    np.subtract.at(steps, ends.searchsorted(stops) + 1, 1)
    return np.add.accumulate(steps[:-1]) > 0


def _in_bytes(text: str, spans: list[Span]) -> list[Span]:
    """A token that holds a part of a character's bytes holds the character, so the marks are the same."""
    if text.isascii():
        return spans
    at, counted, found = 0, 0, {}
    for place in sorted({place for span in spans for place in span}):
        counted += len(text[at:place].encode())
        at, found[place] = place, counted
    return [(found[start], found[end]) for start, end in spans]


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
    if any(sign in token["content"] for sign in SIGNS for token in tokens):
        raise Unfit("its added tokens hold a sign of ours")
    patterns = []
    for normalized in (False, True):
        texts = [token["content"] for token in tokens if token["normalized"] is normalized and token["content"]]
        if texts:
            longest_first = sorted(texts, key=len, reverse=True)
            patterns.append(re.compile(f"({'|'.join(map(re.escape, (HERE, *longest_first)))})"))
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

    core = _tiktoken.CoreBPE({bytes([byte]): byte for byte in range(256)}, {HERE: 256}, pattern)
    found = core.encode_to_tiktoken_buffer(text, frozenset())
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
