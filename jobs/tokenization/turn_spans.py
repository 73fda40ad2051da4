"""Finds where each text and each assistant turn of a chat stands in its rendering, for any chat template.

The chat is rendered a second time with the marks of text_marks.py in its texts. Without its marks the second rendering must equal
the first, so each mark gives a position in it. Comparing renderings of prefixes does not do: many templates rewrite earlier turns
(Qwen 3, DeepSeek R1 and gpt-oss drop their thoughts).
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from jobs.tokenization.conversation import Sample
from jobs.tokenization.offsets import Span
from jobs.tokenization.text_marks import MARK, CannotMark, Marks, MixedTurns, Text, end_mark, positions

BOUNDARY = re.compile(r"[\s>\]]")
"""Characters that end a line or a tag. Where a generation prompt and the text are equal only in part, that part ends behind one."""


class Renderer(Protocol):
    """Renders the turns of a sample with one chat template."""

    def render_prefix(self, sample: Sample, turns: int, generation_prompt: bool) -> str:
        """Text of the first `turns` turns alone, with or without the header of an assistant turn after them."""


class MarkedChat:
    """A rendered chat, and where each of its texts stands in the rendering."""

    def __init__(self, sample: Sample, text: str, renderer: Renderer) -> None:
        """text: the rendering of the whole sample without marks. Raises CannotMark where positions cannot be told."""
        if not text.isascii() and MARK.search(text):
            raise CannotMark("the chat has characters of Unicode's private planes, which Muster uses as marks")
        marks = Marks({number for number, turn in enumerate(sample.turns) if turn.role == "assistant"})
        marked = tuple(marks.turn(turn, number) for number, turn in enumerate(sample.turns))
        self._sample, self._text, self._renderer = replace(sample, turns=marked), text, renderer
        self._texts = marks.texts
        unmarked, places = positions(self._render(len(marked), generation_prompt=False))
        if unmarked != text:
            raise CannotMark("the chat template writes something else when the texts change")
        self._missing = [number for number in range(len(self._texts)) if number not in places]
        self._places = places
        self._regions: dict[int, Span] = {}
        self._last_texts: dict[int, int] = {}
        """Of each turn, the number of its last text."""
        for number, (begin, end) in places.items():
            turn = self._texts[number].turn
            first, last = self._regions.get(turn, (begin, end))
            self._regions[turn] = (min(first, begin), max(last, end))
            if end >= last:
                self._last_texts[turn] = number
        by_place = sorted((begin, end, turn) for turn, (begin, end) in self._regions.items())
        self._order = [begin for begin, _, _ in by_place]
        self._ends: list[tuple[int, int | None]] = list(accumulate(((end, turn) for _, end, turn in by_place), max))
        """Of the turns in the order of their beginnings: the furthest end so far, and whose it is."""
        self._headers: dict[str, str] = {}

    def missing(self) -> Iterator[Text]:
        """Texts that the template never writes.

        Many templates drop texts of earlier turns on purpose: thoughts, and gpt-oss what is said before a call. These are left out.
        """
        turns = self._sample.turns
        last = max((number for number, turn in enumerate(turns) if turn.role in ("user", "assistant")), default=0)
        for number in self._missing:
            item = self._texts[number]
            if item.turn >= last or not (item.is_thought or self._is_written_last(number)):
                yield item

    def _is_written_last(self, number: int) -> bool:
        """Whether a text is written in the chat that ends with its turn."""
        try:
            written = self._render(self._texts[number].turn + 1, generation_prompt=False)
        except CannotMark:
            return False
        return end_mark(number) in written

    def span(self, turn: int, tokens: "Tokens") -> Span | None:
        """Characters of an assistant turn: from the first that the generation prompt leaves to the model, up to and with the
        token that ends the turn. Without such a token, up to where the template goes on in another way than in a chat that ends
        with this turn. None if the turn has neither text nor end. Raises CannotMark if the beginning is unknown.
        """
        before, after, last = self._neighbors(turn)
        own = self._regions.get(turn, (after, before))
        # A content may itself begin with what the generation prompt ends with, as <think>.
        begin = self._begin(turn, before, after, last, tokens) if turn else self._begin_of_first(own[0], tokens)
        if tokens.end.search(self._text, begin, own[0] if turn in self._regions else begin):
            raise CannotMark(f"the beginning of turn {turn} is unknown")
        ending = tokens.end.search(self._text, max(own[1], begin), after)
        if ending:
            return begin, ending.end()
        if turn not in self._regions:
            return None
        return begin, after if after == len(self._text) else own[1] + self._common_tail(turn, own[1], after)

    def _common_tail(self, turn: int, begin: int, end: int) -> int:
        """How much of the text from `begin` also stands behind a turn in the chat that ends with it."""
        _, found, tail = self._render(turn + 1, generation_prompt=False).rpartition(end_mark(self._last_texts[turn]))
        return _common(tail, self._text[begin:end]) if found else 0

    def end(self, turn: int, tokens: "Tokens") -> Span | None:
        """Characters of the token that ends a turn of any role. None if there is none, or if the turn has no text."""
        if turn not in self._regions:
            return None
        _, after, _ = self._neighbors(turn)
        found = tokens.end.search(self._text, self._regions[turn][1], after)
        return found.span() if found else None

    def texts_of_turn(self, turn: int, tokens: "Tokens") -> Span | None:
        """Characters from the first text of a turn to its last, and with the token that ends it."""
        region, end = self._regions.get(turn), self.end(turn, tokens)
        return region and (region[0], end[1] if end else region[1])

    def content_spans(self, turn: int, begin: int, end: int) -> list[Span]:
        """Where the characters [begin, end) of a turn's content stand. Blanks at the ends of a text belong to no text."""
        spans = []
        for number, (first, last) in self._places.items():
            item = self._texts[number]
            if item.turn == turn and item.where.startswith("content"):
                shift = first - item.offset
                span = max(begin + shift, first), min(end + shift, last)
                spans += [span] if span[0] < span[1] else []
        return spans

    def _render(self, turns: int, *, generation_prompt: bool) -> str:
        try:
            return self._renderer.render_prefix(self._sample, turns, generation_prompt)
        except CannotMark:
            raise
        except ValueError as error:
            raise CannotMark(str(error)) from error

    def _neighbors(self, turn: int) -> tuple[int, int, int | None]:
        """(end of the texts before a turn, beginning of the texts after it, the number of the turn before).

        Raises CannotMark where the template mixes the turn with another.
        """
        own = self._regions.get(turn)
        if own is None:
            ends = [(end, number) for number, (_, end) in self._regions.items() if number < turn]
            before, last = max(ends, default=(0, None))
            after = min(
                (region[0] for number, region in self._regions.items() if number > turn), default=len(self._text)
            )
        else:  # By place, not by number: Mistral's template writes the system's text into the last question.
            place = bisect_left(self._order, own[0])
            before, last = self._ends[place - 1] if place else (0, None)
            after = self._order[place + 1] if place + 1 < len(self._order) else len(self._text)
            if before > own[0] or after < own[1]:
                raise MixedTurns(f"the chat template mixes turn {turn} with another")
        if before > after:
            raise CannotMark(f"the chat template changes the order of the turns around turn {turn}")
        return before, after, last

    def _begin(self, turn: int, before: int, limit: int, last: int | None, tokens: "Tokens") -> int:
        """Where the text no longer equals the generation prompt, between the texts before a turn and those after it."""
        header = self._header(turn, last)
        start = before
        if header.strip():  # Blanks behind a question are the question's: some templates strip them.
            header = header.lstrip()
            start += _blanks(self._text, before, limit)
        size = _common(header, self._text[start : min(start + len(header), limit)])
        # The turn before may end in another way where it is the last one.
        if size < len(header) and turn in self._regions:
            place = self._text.find(header, start, self._regions[turn][0])
            start, size = (place, len(header)) if place >= 0 else (start, size)
        if size < len(header):
            size = max((found.end() for found in BOUNDARY.finditer(header, 0, size)), default=size)
        return tokens.outside(self._text, before, start + size)

    def _header(self, turn: int, last: int | None) -> str:
        """What stands between the texts before a turn and what the model writes: the end of the turn before and the
        generation prompt. It is the same after every question and after every result of a tool, so it is rendered once for each.
        """
        before = self._sample.turns[turn - 1].role
        is_usual = last == turn - 1 and before != "assistant"
        if is_usual and before in self._headers:
            return self._headers[before]
        header = self._render(turn, generation_prompt=True)
        if last is not None:
            _, found, header = header.rpartition(end_mark(self._last_texts[last]))
            if not found:
                raise CannotMark(f"the chat template does not write turn {last} before turn {turn}")
        if MARK.search(header):
            raise CannotMark(f"the chat template writes the turns before turn {turn} in another order")
        if is_usual and header.strip():
            self._headers[before] = header
        return header

    def _begin_of_first(self, limit: int, tokens: "Tokens") -> int:
        """Where the first turn of a chat begins: behind the longest beginning of the generation prompt that stands there."""
        count = len(self._sample.turns)
        whole, prompt = (self._render(count, generation_prompt=yes) for yes in (False, True))
        prompt = prompt[tokens.outside(prompt, 0, _common(whole, prompt)) :]
        least = tokens.any.match(prompt) or re.match(r"\s*\S+", prompt)
        for size in range(len(prompt), least.end() - 1 if least else len(prompt), -1):
            place = self._text.rfind(prompt[:size], 0, limit)
            if place >= 0:
                return tokens.outside(self._text, 0, place + size)
        raise CannotMark("the first turn is the assistant's, and its beginning is unknown")


class Tokens:
    """The tokens of a tokenizer that matter for spans."""

    def __init__(self, ends: Collection[str], special: Collection[str], next_roles: tuple[str, ...] = ()) -> None:
        """ends: tokens that end a turn. special: all tokens that are found in texts as they are.

        next_roles: if answers end with the token of the next role, the token after an answer and that after a call.
        """
        self.ends, self._next_roles = tuple(ends), next_roles
        self.end, self.any = _any_of(frozenset(ends)), _any_of(frozenset(special) | frozenset(ends))

    def next_role(self, *, after_call: bool) -> str | None:
        """The token of the next role that ends an answer or a call; None if they do not end so."""
        return self._next_roles[after_call] if self._next_roles else None

    def outside(self, text: str, begin: int, position: int) -> int:
        """The position, or the beginning of the token that it would cut."""
        for token in self.any.finditer(text, begin):
            if token.start() >= position:
                break
            if token.end() > position:
                return token.start()
        return position


@lru_cache(maxsize=16)
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or r"(?!)")


def _blanks(text: str, begin: int, end: int) -> int:
    """Number of blank characters from `begin`."""
    part = text[begin:end]
    return len(part) - len(part.lstrip())


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length
