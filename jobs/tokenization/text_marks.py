"""Puts invisible marks into the texts of a chat (content, thoughts, names and arguments of calls), and finds them again."""

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.offsets import Span

FIRST_MARK, LAST_MARK = 0xF0000, 0x10FFFD
"""Marks are characters of the private planes 15 and 16, which hardly any text has."""
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(LAST_MARK)}])")
THOUGHT_BEGIN, THOUGHT_END = "<think>", "</think>"


class CannotMark(ValueError):
    """The template writes something else when texts have marks, or does not show where a turn begins."""


class MixedTurns(CannotMark):
    """The template writes texts of one turn between those of another."""


class Text(NamedTuple):
    """One text of a chat: the number of its turn and its place there, as `tool_calls[0].arguments.city`."""

    turn: int
    where: str
    offset: int = 0
    """Characters before the text in the content of its turn."""

    @property
    def is_thought(self) -> bool:
        """Whether the text is what the assistant thought before it answered."""
        return self.where.startswith("reasoning_content") or self.where == f"content before {THOUGHT_END}"


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
        is_plain = turn.extra is None and not (turn.is_null or turn.is_absent or turn.in_parts)
        if calls is None and turn.reasoning_content is None and is_plain:
            return Turn(turn.role, content, None, turn.name, turn.train, turn.tool_call_id)  # faster than `replace`
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

    def _text(self, text: str, turn: int, where: str, offset: int = 0) -> str:
        """The text with a mark at both ends, inside its blanks: templates strip those."""
        body = text.strip()
        if not body:
            return text
        begin = text.index(body)
        return text[:begin] + self._body(body, turn, where, offset + begin) + text[begin + len(body) :]

    def _body(self, body: str, turn: int, where: str, offset: int) -> str:
        thought, closing, answer = body.rpartition(THOUGHT_END)
        if closing and turn in self._answers:
            # Templates cut content there: the thought and the answer are texts of their own.
            opening = THOUGHT_BEGIN if thought.startswith(THOUGHT_BEGIN) else ""
            inside = thought.removeprefix(opening)
            inside = self._text(inside, turn, f"{where} before {THOUGHT_END}", offset + len(opening))
            offset += len(thought) + len(closing)
            return opening + inside + closing + self._text(answer, turn, f"{where} after {THOUGHT_END}", offset)
        number = FIRST_MARK + 2 * len(self.texts)
        if number + 1 > LAST_MARK:
            raise CannotMark("the chat has more texts than there are marks")
        self.texts.append(Text(turn, where, offset))
        return chr(number) + body + chr(number + 1)


def end_mark(number: int) -> str:
    """The mark behind text `number`."""
    return chr(FIRST_MARK + 2 * number + 1)


def positions(rendered: str) -> tuple[str, dict[int, Span]]:
    """(a rendering without its marks, where each text stands). A text written twice has the place of its first copy."""
    begins, found = dict[int, int](), dict[int, Span]()
    parts, length = MARK.split(rendered), 0  # text, mark, text, mark, ..., text
    for part, mark in zip(parts[::2], parts[1::2], strict=False):
        length += len(part)
        number, is_end = divmod(ord(mark) - FIRST_MARK, 2)
        if not is_end:
            begins.setdefault(number, length)
        elif number in begins:
            found.setdefault(number, (begins[number], length))
    return "".join(parts[::2]), found


def texts_of(sample: Sample) -> Iterator[tuple[Text, str]]:
    """Every text of a chat that a template should write, without the blanks around it, and its place."""
    for number, turn in enumerate(sample.turns):
        if turn.content:
            yield Text(number, "content"), turn.content.strip()
        if turn.reasoning_content is not None:
            yield from _texts_in(turn.reasoning_content, number, "reasoning_content")
        for i, call in enumerate(turn.tool_calls or ()):
            for key in ("name", "arguments"):
                yield from _texts_in(call["function"].get(key), number, f"tool_calls[{i}].{key}")


def _texts_in(value: Any, turn: int, where: str) -> Iterator[tuple[Text, str]]:
    if isinstance(value, str):
        yield Text(turn, where), value.strip()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts_in(item, turn, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts_in(item, turn, f"{where}[{number}]")
