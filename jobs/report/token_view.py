"""Decodes samples for the eye: tokens in pieces that can be read alone, with signs for what cannot be seen."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from markupsafe import escape
from transformers import PreTrainedTokenizerBase

from jobs.data.batches import Rows

Places = Callable[[int], str]
"""`file:line` of a sample, by its number in the samples of its split."""
MARKUP_BYTES = 90_000
"""Of a sample on the page, so that ten stay under a megabyte; one that takes more is shown in a quarter of the tokens."""
BROKEN = "\ufffd"
LONGEST_RUN = 32
"""Tokens that may make up characters together: a character is at most four bytes, but may come after a stray one."""
MARKED = re.compile(
    r" {2,}|^ | $|[^\S ]|[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]", re.MULTILINE
)
"""What cannot be seen as it stands: blanks but a single one between words, line ends, control characters."""
SIGNS = {" ": "·", "\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\xa0": "⍽", "\x7f": "␡"}


@dataclass(frozen=True)
class Piece:
    """A token, or the few that make up a character together."""

    ids: str
    special: bool
    segments: list[tuple[bool, str]]
    """Its text: (whether these are signs for what cannot be seen, text)."""


@dataclass(frozen=True)
class Shown:
    """A sample as it is shown: whole, or its beginning and its end."""

    place: str
    tokens: int
    trained: int
    stretches: list[list[tuple[bool, list[Piece]]]]
    """Of each stretch, its pieces by whether they are trained."""
    left: int
    """Tokens between the stretches."""


def shown(number: int, rows: Rows, decoder: "Decoder", places: Places, limit: int) -> Shown:
    """One sample decoded, of a longer one `limit` tokens, or fewer where its text is huge."""
    ids, trained = rows.samples[number]
    while True:
        half = limit // 2
        cuts = [slice(None)] if len(ids) <= limit else [slice(half), slice(len(ids) - half, None)]
        found = [list(decoder.runs(ids[cut].tolist(), trained[cut].tolist())) for cut in cuts]
        if limit < 10 or sum(_bytes(text) for stretch in found for _, _, text in stretch) <= MARKUP_BYTES:
            break
        limit //= 4
    stretches = [_signed(stretch, decoder.special) for stretch in found]
    left = max(0, len(ids) - 2 * half) if len(cuts) > 1 else 0
    return Shown(places(number), len(ids), int(trained[1:].sum()), stretches, left)


class Decoder:
    """Splits tokens into pieces of text that can be read alone, and remembers the text of each token."""

    def __init__(self, words: PreTrainedTokenizerBase) -> None:
        self.words = words
        self.before = words.encode("a", add_special_tokens=False)
        self.skipped = self._plain(self.before)
        added = {token for token, about in words.added_tokens_decoder.items() if about.special}
        self.special = added | set(words.all_special_ids)
        self.known: dict[int, str] = {}

    def runs(self, ids: list[int], trained: list[int]) -> Iterator[tuple[bool, list[int], str]]:
        """(trained, tokens, their text) of all pieces: none is trained in part."""
        for flag, part in groupby(zip(ids, trained, strict=True), lambda pair: pair[1]):
            for tokens, text in self.pieces(token for token, _ in part):
                yield bool(flag), tokens, text

    def pieces(self, ids: Iterable[int]) -> Iterator[tuple[list[int], str]]:
        """(tokens, their text), in order: one token where it is whole characters, else as many as make one up."""
        run: list[int] = []
        for token in ids:
            alone = self.known.get(token)
            if alone is None:
                alone = self.known[token] = self.text([token])
            if BROKEN not in alone:
                if run:
                    yield run, self.text(run)
                    run = []
                yield [token], alone
                continue
            run.append(token)
            text = self.text(run)
            if BROKEN not in text or len(run) == LONGEST_RUN:
                yield run, text
                run = []
        if run:
            yield run, self.text(run)

    def text(self, ids: list[int]) -> str:
        """Text of tokens behind others: some tokenizers strip the blank of those that come first."""
        whole = self._plain([*self.before, *ids])
        text = whole.removeprefix(self.skipped) if whole.startswith(self.skipped) else self._plain(ids)
        return text or f"[{' '.join(map(str, ids))}]"

    def _plain(self, ids: list[int]) -> str:
        return self.words.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _signed(pieces: list[tuple[bool, list[int], str]], special: set[int]) -> list[tuple[bool, list[Piece]]]:
    """Pieces by whether they are trained, with signs for what cannot be seen, which a blank's neighbours decide."""
    whole = "".join(text for _, _, text in pieces)
    signs, at, built = bytearray(len(whole)), 0, []
    for place in MARKED.finditer(whole):
        signs[place.start() : place.end()] = b"\1" * (place.end() - place.start())
    for flag, tokens, text in pieces:
        segments = _segments(text, signs[at : at + len(text)])
        at += len(text)
        built.append((flag, Piece(" ".join(map(str, tokens)), tokens[0] in special, segments)))
    return [(flag, [piece for _, piece in part]) for flag, part in groupby(built, lambda pair: pair[0])]


@lru_cache(2**16)
def _bytes(text: str) -> int:
    """What a piece takes on the page, at most about."""
    return 30 + len(escape(text).encode()) + 9 * len(MARKED.findall(text))


def _segments(text: str, signs: bytearray) -> list[tuple[bool, str]]:
    if not any(signs):
        return [(False, text)]
    groups = groupby(zip(signs, text, strict=True), lambda pair: pair[0])
    return [(bool(sign), "".join(_sign(char) if sign else char for _, char in part)) for sign, part in groups]


def _sign(char: str) -> str:
    if char in SIGNS:
        return SIGNS[char]
    return chr(0x2400 + ord(char)) if ord(char) < 32 else f"‹U+{ord(char):04X}›"


def printable(segment: tuple[bool, str]) -> str:
    """Blanks and line ends as they are, and signs for what a terminal would obey."""
    sign, text = segment
    return text.replace("·", " ").replace("⏎", "").replace("⇥", "") if sign else text
