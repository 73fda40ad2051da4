"""Decodes samples token by token for a reader, with visible signs for whitespace and control characters."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from markupsafe import escape
from transformers import PreTrainedTokenizerBase

from jobs.data.batches import Rows
from jobs.tokenization.tokenizer import special_token_ids

LocationOf = Callable[[int], str]
"""Gives `file:line` of a sample, by the sample's number in its split."""
MAX_MARKUP_BYTES = 90_000
"""Per sample on the page, so that ten samples stay under a megabyte. A larger one is shown with a quarter of its tokens."""
REPLACEMENT_CHARACTER = "\ufffd"
MAX_GROUP = 32
"""Tokens that are decoded together at most. A character has at most four bytes, but stray bytes may come before it."""
INVISIBLE = re.compile(
    r" {2,}|^ | $|[^\S ]|[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]", re.MULTILINE
)
"""All whitespace but single spaces between words, and control characters."""
SIGNS = {" ": "·", "\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\xa0": "⍽", "\x7f": "␡"}

DecodedGroup = tuple[bool, list[int], str]
"""(trained, token ids, their text): one token, or the tokens that make up one character together."""


@dataclass(frozen=True)
class TokenGroup:
    """One token, or the few tokens that make up one character together."""

    ids: str
    special: bool
    segments: list[tuple[bool, str]]
    """Its text in parts: (whether the part consists of signs for invisible characters, text)."""


TrainedRun = tuple[bool, list[TokenGroup]]
"""(trained, neighboring token groups)."""


@dataclass(frozen=True)
class SampleView:
    """A decoded sample: all of it, or its beginning and its end."""

    location: str
    tokens: int
    trained: int
    parts: list[list[TrainedRun]]
    """One part, or two: the beginning and the end."""
    omitted: int
    """Number of tokens between the two parts."""


def view_sample(number: int, rows: Rows, decoder: "Decoder", location_of: LocationOf, limit: int) -> SampleView:
    """Decode one sample. A sample of more than `limit` tokens is cut to `limit`, or to fewer if their text is very large."""
    ids, trained = rows.samples[number]
    while True:
        half = limit // 2
        slices = [slice(None)] if len(ids) <= limit else [slice(half), slice(len(ids) - half, None)]
        decoded = [list(decoder.runs(ids[part].tolist(), trained[part].tolist())) for part in slices]
        if limit < 10 or sum(_markup_bytes(text) for part in decoded for _, _, text in part) <= MAX_MARKUP_BYTES:
            break
        limit //= 4
    parts = [_with_signs(part, decoder.special) for part in decoded]
    omitted = max(0, len(ids) - 2 * half) if len(slices) > 1 else 0
    return SampleView(location_of(number), len(ids), int(trained[1:].sum()), parts, omitted)


class Decoder:
    """Decodes tokens one by one as far as possible, and caches the text of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prefix = tokenizer.encode("a", add_special_tokens=False)
        self.prefix_text = self.whole(self.prefix)
        self.special = special_token_ids(tokenizer)
        self.text_of_token: dict[int, str] = {}

    def runs(self, ids: list[int], trained: list[int]) -> Iterator[DecodedGroup]:
        """Decode tokens in groups, none of which is partly trained."""
        for flag, pairs in groupby(zip(ids, trained, strict=True), lambda pair: pair[1]):
            for tokens, text in self.groups(token for token, _ in pairs):
                yield bool(flag), tokens, text

    def groups(self, ids: Iterable[int]) -> Iterator[tuple[list[int], str]]:
        """(tokens, their text) in order: one token if it holds whole characters, else all tokens that make up one together."""
        pending: list[int] = []
        for token in ids:
            alone = self.text_of_token.get(token)
            if alone is None:
                alone = self.text_of_token[token] = self.text([token])
            if REPLACEMENT_CHARACTER not in alone:
                if pending:
                    yield pending, self.text(pending)
                    pending = []
                yield [token], alone
                continue
            pending.append(token)
            text = self.text(pending)
            if REPLACEMENT_CHARACTER not in text or len(pending) == MAX_GROUP:
                yield pending, text
                pending = []
        if pending:
            yield pending, self.text(pending)

    def text(self, ids: list[int]) -> str:
        """Text of tokens that follow other tokens, or their ids if they have no text."""
        return self.plain(ids) or f"[{' '.join(map(str, ids))}]"

    def plain(self, ids: list[int]) -> str:
        """Text of tokens that follow other tokens: some tokenizers strip the leading space of the first token."""
        with_prefix = self.whole([*self.prefix, *ids])
        return (
            with_prefix.removeprefix(self.prefix_text) if with_prefix.startswith(self.prefix_text) else self.whole(ids)
        )

    def whole(self, ids: list[int]) -> str:
        """Text of a whole sample."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _with_signs(groups: list[DecodedGroup], special: frozenset[int]) -> list[TrainedRun]:
    """Token groups by whether they are trained. The whole text decides which characters are invisible, e.g. double spaces."""
    whole = "".join(text for _, _, text in groups)
    invisible, start, marked = bytearray(len(whole)), 0, []
    for match in INVISIBLE.finditer(whole):
        invisible[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    for flag, tokens, text in groups:
        segments = _segments(text, invisible[start : start + len(text)])
        start += len(text)
        marked.append((flag, TokenGroup(" ".join(map(str, tokens)), tokens[0] in special, segments)))
    return [(flag, [group for _, group in run]) for flag, run in groupby(marked, lambda pair: pair[0])]


@lru_cache(2**16)
def _markup_bytes(text: str) -> int:
    """Bytes that a token group takes on the page; an upper estimate."""
    return 30 + len(escape(text).encode()) + 9 * len(INVISIBLE.findall(text))


def _segments(text: str, invisible: bytearray) -> list[tuple[bool, str]]:
    if not any(invisible):
        return [(False, text)]
    runs = groupby(zip(invisible, text, strict=True), lambda pair: pair[0])
    return [(bool(sign), "".join(_sign(char) if sign else char for _, char in run)) for sign, run in runs]


def _sign(char: str) -> str:
    if char in SIGNS:
        return SIGNS[char]
    return chr(0x2400 + ord(char)) if ord(char) < 32 else f"‹U+{ord(char):04X}›"


def terminal_text(segment: tuple[bool, str]) -> str:
    """A segment for a terminal: whitespace as it is, but signs for control characters that a terminal would act on."""
    is_sign, text = segment
    return text.replace("·", " ").replace("⏎", "").replace("⇥", "") if is_sign else text
