"""Gives a chat to its template in the form that the template reads, and refuses what the template would drop.

Templates differ in what they want: arguments of calls as an object or as JSON text, null or an empty text as the content of a
call, the role `developer` or only `system`. A template that gets the wrong form often drops or changes a text without an error.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, Protocol

from jobs.tokenization import turn_spans
from jobs.tokenization.conversation import Sample, Turn
from jobs.tokenization.offsets import Span
from jobs.tokenization.text_marks import THOUGHT_END, CannotMark, Text, texts_of
from jobs.tokenization.turn_spans import MarkedChat

NULL, ABSENT, EMPTY = (True, False), (False, True), (False, False)
"""What a template gets as the content of a turn that has none: the values of `is_null` and `is_absent`."""
TESTS_NULL = re.compile(r"content[^%}]{0,20}(?:\bis\s+(?:not\s+)?|[!=]=\s*)none\b", re.IGNORECASE)
PARTS = re.compile(r"""["']type["']: ["']text["']""")
"""How a template that knows no parts writes them."""


class Renderer(turn_spans.Renderer, Protocol):
    """Renders the turns of a sample with one chat template."""

    source: str
    """Jinja source of the template."""
    has_marks: bool
    """Whether the template has `{% generation %}` marks."""

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        """(text of all turns, the spans between the template's generation marks in order)."""


@dataclass
class RenderedChat:
    """A sample in the form that its template reads, and its text."""

    sample: Sample
    text: str
    generation_spans: list[Span]
    renderer: Renderer
    _marked: MarkedChat | CannotMark | None = None

    def marked(self) -> MarkedChat:
        """The places of the texts in the rendering. Raises CannotMark."""
        if self._marked is None:
            try:
                self._marked = MarkedChat(self.sample, self.text, self.renderer)
            except CannotMark as error:
                self._marked = error
        if isinstance(self._marked, CannotMark):
            raise self._marked
        return self._marked

    @cached_property
    def missing(self) -> Text | None:
        """The first text that the template does not write. None if it writes all of them."""
        if self.renderer.has_marks and self._has_all_in_order():
            return None  # The usual case of a template whose generation marks give the turns, and much faster.
        try:
            return next(self.marked().missing(), None)
        except CannotMark:
            last = len(self.sample.turns) - 1
            return next(
                (
                    item
                    for item, text in texts_of(self.sample)
                    if not (item.is_thought and item.turn < last) and not self._writes(text)
                ),
                None,
            )

    def _has_all_in_order(self) -> bool:
        """Whether the rendering has all texts, and the contents one after the other."""
        position = 0
        for turn in self.sample.turns:  # the contents first: most turns have nothing else
            content = turn.content.strip()
            found = self.text.find(content, position)
            if found < 0:
                return False
            position = found + len(content)
        if all(turn.tool_calls is None and turn.reasoning_content is None for turn in self.sample.turns):
            return True
        return all(text in self.text for _, text in texts_of(self.sample))

    def _writes(self, text: str) -> bool:
        """Whether the text is in the rendering, as it is or inside JSON. A template may cut thoughts off."""
        parts = text.split(THOUGHT_END)[-1:] if THOUGHT_END in text else [text]
        return all(
            any(form in self.text for form in (part.strip(), json.dumps(part)[1:-1], _json(part)[1:-1]))
            for part in parts
        )


def render(sample: Sample, renderer: Renderer) -> RenderedChat:
    """Render a chat in the first form of which the template writes every text.

    Raises ValueError if the template refuses every form, does not write a text of the chat, or does not read a variable of the
    row.
    """
    _check_variables(sample, renderer)
    if "developer" not in renderer.source and any(turn.role == "developer" for turn in sample.turns):
        sample = _map_turns(sample, lambda turn: replace(turn, role="system") if turn.role == "developer" else turn)
    chat = _render_best(_forms(sample, renderer.source), renderer)
    if isinstance(chat, ValueError) or chat.missing is not None:
        in_parts = _map_turns(sample, lambda turn: replace(turn, in_parts=not turn.is_null))
        other = _render_best(_forms(in_parts, renderer.source), renderer)
        chat = chat if isinstance(other, ValueError) or not _is_whole(other) else other
    if isinstance(chat, ValueError):
        raise chat
    _check_written(chat.missing)
    return chat


def _render_best(forms: Iterator[Sample], renderer: Renderer) -> RenderedChat | ValueError:
    """The first form of which the template writes every text; else the first that it does not refuse; else its first error."""
    first_error: ValueError | None = None
    first_chat: RenderedChat | None = None
    for form in forms:
        try:
            chat = RenderedChat(form, *renderer.render(form), renderer)
        except ValueError as error:
            first_error = first_error or error
            continue
        if _is_whole(chat):
            return chat
        first_chat = first_chat or chat
    found = first_chat or first_error
    assert found is not None  # there is at least one form
    return found


def _map_turns(sample: Sample, change: Callable[[Turn], Turn]) -> Sample:
    return replace(sample, turns=tuple(map(change, sample.turns)))


def _forms(sample: Sample, source: str) -> Iterator[Sample]:
    """The forms to try in turn, the likeliest first. Most chats have only one, and that is the sample itself."""
    calls = [call for turn in sample.turns for call in turn.tool_calls or ()]
    null = any(turn.is_null for turn in sample.turns)
    if not (calls or null):
        yield sample
        return
    has_text = any(isinstance(call["function"].get("arguments"), str) for call in calls)
    changes = [None] if not calls else [_as_text, _as_object] if has_text else [_as_object, _as_text]
    contents: list[tuple[bool, bool] | None]
    contents = [NULL, ABSENT, EMPTY] if TESTS_NULL.search(source) else [ABSENT, EMPTY, NULL]
    if not null:  # an empty text is what the row says
        contents = (
            [EMPTY, NULL] if any(turn.tool_calls and not turn.content.strip() for turn in sample.turns) else [None]
        )
    for content, change in product(contents, changes):
        yield _map_turns(sample, partial(_form, content=content, change=change))


def _form(turn: Turn, content: tuple[bool, bool] | None, change: Callable[[Any], Any] | None) -> Turn:
    if turn.tool_calls and change:
        calls = []
        for call in turn.tool_calls:
            function = call["function"]
            changed = function | {"arguments": change(function["arguments"])} if "arguments" in function else function
            calls.append({**call, "function": changed})
        turn = replace(turn, tool_calls=calls)
    if content and (turn.is_null or (turn.tool_calls and not turn.content.strip())):
        turn = replace(turn, is_null=content[0], is_absent=content[1])
    return turn


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else _json(arguments)


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_whole(chat: RenderedChat) -> bool:
    return _is_unchanged(chat) and chat.missing is None


def _is_unchanged(chat: RenderedChat) -> bool:
    """Whether the template writes what it got: no `None` for null, no arguments quoted as one text, no Python notation."""
    if any(turn.in_parts for turn in chat.sample.turns) and PARTS.search(chat.text):
        return False
    if "None" in chat.text and any(turn.is_null for turn in chat.sample.turns):
        empty = _map_turns(chat.sample, lambda turn: replace(turn, is_null=False))
        try:
            if chat.text.count("None") > chat.renderer.render(empty)[0].count("None"):
                return False
        except ValueError:
            pass
    for turn in chat.sample.turns:
        for call in turn.tool_calls or ():
            arguments = call["function"].get("arguments")
            if isinstance(arguments, str):
                # Gemma 4 writes text between braces of its own.
                changed = (json.dumps(arguments), _json(arguments), f"{{{arguments}}}")
                if arguments not in chat.text or any(text in chat.text for text in changed):
                    return False
            elif arguments and str(arguments) in chat.text and str(arguments) != _json(arguments):
                return False
    return True


def _check_written(missing: Text | None) -> None:
    """Raises ValueError for a text that the template does not write."""
    if missing is None:
        return
    kind, also = "such texts", "the text"
    if missing.where.startswith("tool_calls"):
        kind, also = "tool calls", "the calls"
    elif missing.is_thought:
        kind, also = "thoughts", "them"
    raise ValueError(
        f"the chat template does not write {missing.where} of messages[{missing.turn}]: "
        f"use a template that knows {kind}, or drop {also}"
    )


def _check_variables(sample: Sample, renderer: Renderer) -> None:
    """Raises ValueError for a variable of the row that the template does not read."""
    for name in sample.template_kwargs or ():
        if not reads(renderer.source, name):
            raise ValueError(
                f"the chat template does not read {name} of chat_template_kwargs: "
                "use a template that does, or set data.ignore=[chat_template_kwargs]"
            )


def reads(source: str, name: str) -> bool:
    """Whether a template names this variable."""
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def unread(sample: Sample, renderer: Renderer) -> str | None:
    """Which tools, documents or names of the row the template does not write, and what to do about it; None if it writes all.

    This is no error here, because some templates never write them, and users may have written the tools into the system turn.
    Raises the same errors as `render`.
    """
    if not (sample.tools or sample.documents or any(turn.name for turn in sample.turns)):
        return None
    chat = render(sample, renderer)
    sample, text = chat.sample, chat.text
    if sample.tools and not all(_json(tool) in text or _json(tool["function"]) in text for tool in sample.tools):
        names = [str(tool["function"].get("name")) for tool in sample.tools]
        lost = [name for name in names if name not in text]
        if lost or _renders_same(chat, replace(sample, tools=None)):
            return f"tools ({', '.join(lost or names)}): use a template that knows tools, or set data.ignore=[tools]"
    if sample.documents and _renders_same(chat, replace(sample, documents=None)):
        return "documents: use a template that knows documents, or set data.ignore=[documents]"
    named = [(number, turn) for number, turn in enumerate(sample.turns) if turn.name and turn.role != "tool"]
    if named:
        nameless = _map_turns(sample, lambda turn: turn if turn.role == "tool" else replace(turn, name=None))
        if _renders_same(chat, nameless):
            number, turn = named[0]
            return f"name {turn.name} of messages[{number}]: use a template that knows names, or set data.ignore=[name]"
    return None


def _renders_same(chat: RenderedChat, other: Sample) -> bool:
    try:
        return chat.renderer.render(other)[0] == chat.text
    except ValueError:
        return False
