"""Finds where each text and each assistant turn of a chat stands in its rendering, for any chat template.

The chat is rendered a second time with an invisible mark at both ends of every text: content, thoughts, names and arguments of
calls. Without its marks the second rendering must equal the first, so each mark gives a position in it. Comparing renderings of
prefixes does not do: many templates rewrite earlier turns (Qwen 3, DeepSeek R1 and gpt-oss drop their thoughts).
"""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.offsets import Span

FIRST_MARK, LAST_MARK = 0xF0000, 0x10FFFD
"""Marks are characters of the private planes 15 and 16, which hardly any text has."""
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(LAST_MARK)}])")
THOUGHT_BEGIN, THOUGHT_END = "<think>", "</think>"
THOUGHT_PLACES = ("reasoning_content", f"content before {THOUGHT_END}")
BOUNDARY = re.compile(r"[\s>\]]")
"""Characters after which a generation prompt may part from what a template writes: those that end a line or a tag."""


class CannotMark(ValueError):
    """The template writes something else when texts have marks, or does not show where a turn begins."""


class Renderer(Protocol):
    """Renders the turns of a sample with one chat template."""

    def render_prefix(self, sample: Sample, turns: int, generation_prompt: bool) -> str:
        """Text of the first `turns` turns alone, with or without the header of an assistant turn after them."""


class Text(NamedTuple):
    """One text of a chat: the number of its turn and its place there, as `tool_calls[0].arguments.city`."""

    turn: int
    where: str


class Marks:
    """Puts marks into the texts of turns."""

    def __init__(self, answers: Collection[int]) -> None:
        """answers: the numbers of the assistant turns."""
        self._answers = answers
        self.texts: list[Text] = []
        """Every text with marks. The mark before text n is character FIRST_MARK + 2n, the one behind it the next character."""

    def turn(self, turn: Turn, number: int) -> Turn:
        """A copy of the turn with marks in its content, thoughts and calls."""
        calls, content = turn.tool_calls, self._text(turn.content, number, "content")
        if calls is None and turn.reasoning_content is None:  # the usual turn: faster than `replace`
            return Turn(turn.role, content, None, turn.name, turn.train, turn.tool_call_id)
        return replace(
            turn,
            content=content,
            reasoning_content=self._value(turn.reasoning_content, number, "reasoning_content"),
            tool_calls=calls and [self._call(call, number, f"tool_calls[{i}]") for i, call in enumerate(calls)],
        )

    def _call(self, call: dict[str, Any], turn: int, where: str) -> dict[str, Any]:
        function = dict(call["function"])
        for key in ("name", "arguments"):
            if key in function:
                function[key] = self._value(function[key], turn, f"{where}.{key}")
        return {**call, "function": function}

    def _value(self, value: Any, turn: int, where: str) -> Any:
        """A JSON value with marks in all its texts."""
        if isinstance(value, str):
            return self._text(value, turn, where)
        if isinstance(value, dict):
            return {key: self._value(item, turn, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(item, turn, f"{where}[{number}]") for number, item in enumerate(value)]
        return value

    def _text(self, text: str, turn: int, where: str) -> str:
        """The text with a mark at both ends, inside its blanks: templates strip those."""
        body = text.strip()
        if not body:
            return text
        begin = text.index(body)
        return text[:begin] + self._body(body, turn, where) + text[begin + len(body) :]

    def _body(self, body: str, turn: int, where: str) -> str:
        thought, closing, answer = body.rpartition(THOUGHT_END)
        if (
            closing and turn in self._answers
        ):  # templates cut content there: the thought and the answer are texts of their own
            opening = THOUGHT_BEGIN if thought.startswith(THOUGHT_BEGIN) else ""
            inside = self._text(thought.removeprefix(opening), turn, f"{where} before {THOUGHT_END}")
            return opening + inside + closing + self._text(answer, turn, f"{where} after {THOUGHT_END}")
        number = FIRST_MARK + 2 * len(self.texts)
        if number + 1 > LAST_MARK:
            raise CannotMark("the chat has more texts than there are marks")
        self.texts.append(Text(turn, where))
        return chr(number) + body + chr(number + 1)


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
        unmarked, positions = self._positions(self._render(len(marked), generation_prompt=False))
        if unmarked != text:
            raise CannotMark("the chat template writes something else when the texts change")
        self._missing = [number for number in range(len(self._texts)) if number not in positions]
        self._regions: dict[int, Span] = {}
        self._last_texts: dict[int, int] = {}
        """Of each turn, the number of its last text."""
        for number, (begin, end) in positions.items():
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
            if item.turn >= last or not (item.where in THOUGHT_PLACES or self._is_written_last(number)):
                yield item

    def _is_written_last(self, number: int) -> bool:
        """Whether a text is written in the chat that ends with its turn."""
        try:
            return chr(FIRST_MARK + 2 * number + 1) in self._render(
                self._texts[number].turn + 1, generation_prompt=False
            )
        except CannotMark:
            return False

    def span(self, turn: int, tokens: "Tokens") -> Span | None:
        """Characters of an assistant turn: from the first that the generation prompt leaves to the model, up to and with the
        token that ends the turn. None if the template writes no such token. Raises CannotMark if the beginning is unknown.
        """
        before, after, last = self._neighbors(turn)
        own = self._regions.get(turn, (after, before))
        # A content may itself begin with what the generation prompt ends with, as <think>.
        begin = self._begin(turn, before, after, last, tokens) if turn else self._begin_of_first(own[0], tokens)
        if tokens.end.search(self._text, begin, own[0] if turn in self._regions else begin):
            raise CannotMark(f"the beginning of turn {turn} is unknown")
        ending = tokens.end.search(self._text, max(own[1], begin), after)
        return (begin, ending.end()) if ending else None

    def _render(self, turns: int, *, generation_prompt: bool) -> str:
        try:
            return self._renderer.render_prefix(self._sample, turns, generation_prompt)
        except CannotMark:
            raise
        except ValueError as error:
            raise CannotMark(str(error)) from error

    def _positions(self, rendered: str) -> tuple[str, dict[int, Span]]:
        """(the rendering without its marks, where each text stands). A text written twice has the place of its first copy."""
        begins, positions = dict[int, int](), dict[int, Span]()
        parts, length = MARK.split(rendered), 0  # text, mark, text, mark, ..., text
        for part, mark in zip(parts[::2], parts[1::2], strict=False):
            length += len(part)
            number, is_end = divmod(ord(mark) - FIRST_MARK, 2)
            if not is_end:
                begins.setdefault(number, length)
            elif number in begins:
                positions.setdefault(number, (begins[number], length))
        return "".join(parts[::2]), positions

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
                raise CannotMark(f"the chat template mixes turn {turn} with another")
        if before > after:
            raise CannotMark(f"the chat template changes the order of the turns around turn {turn}")
        return before, after, last

    def _begin(self, turn: int, before: int, limit: int, last: int | None, tokens: "Tokens") -> int:
        """Where the text parts from the generation prompt, between the texts before a turn and those after it."""
        header = self._header(turn, last)
        start = before
        if header.strip():  # Blanks behind a question are the question's: some templates strip them.
            header = header.lstrip()
            start += _blanks(self._text, before, limit)
        size = _common(header, self._text[start : min(start + len(header), limit)])
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
            _, found, header = header.rpartition(chr(FIRST_MARK + 2 * self._last_texts[last] + 1))
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

    def __init__(self, ends: Collection[str], special: Collection[str]) -> None:
        """ends: tokens that end a turn. special: all tokens that are found in texts as they are."""
        self.ends = tuple(ends)
        self.end, self.any = _any_of(frozenset(ends)), _any_of(frozenset(special) | frozenset(ends))

    def outside(self, text: str, begin: int, position: int) -> int:
        """The position, or the beginning of the token that it would cut."""
        for token in self.any.finditer(text, begin):
            if token.start() >= position:
                break
            if token.end() > position:
                return token.start()
        return position


def texts_of(sample: Sample) -> Iterator[str]:
    """Every text of a chat that a template should write, without the blanks around it."""
    for turn in sample.turns:
        yield turn.content.strip()
        if turn.reasoning_content is not None:
            yield from _texts_in(turn.reasoning_content)
        for call in turn.tool_calls or ():
            yield from _texts_in([call["function"].get("name"), call["function"].get("arguments")])


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


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
