"""Decides which characters of a sample are trained on: all assistant turns, the last one, or the whole text."""

import re
from contextlib import suppress
from typing import NamedTuple, Protocol

from jobs.tokenization import turn_spans
from jobs.tokenization.chat_template import BUNDLED
from jobs.tokenization.conversation import Sample
from jobs.tokenization.offsets import Span
from jobs.tokenization.text_marks import CannotMark, Text, texts_of
from jobs.tokenization.turn_spans import MarkedChat, Tokens

MASKS = ("assistant", "last", "all")

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Opens a block that transformers reports as written by the assistant (`return_assistant_tokens_mask`)."""

REMEDY = f"use a template with {{% generation %}} marks, such as one of {', '.join(BUNDLED)}"


class Renderer(turn_spans.Renderer, Protocol):
    """Renders the turns of a sample with one chat template."""

    has_marks: bool
    """Whether the template has `{% generation %}` marks."""

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        """(text of all turns, the spans between the template's generation marks in order)."""


class TrainedSpans(NamedTuple):
    """Characters of a rendered sample to train on: `spans` without `excluded`."""

    text: str
    spans: list[Span]
    excluded: list[Span]


def check_mask(mask: str) -> None:
    """Raises ValueError for a mask that does not exist."""
    if mask not in MASKS:
        raise ValueError(f"mask {mask!r} is unknown: use one of {', '.join(MASKS)}")


def join_parts(parts: tuple[tuple[str, bool], ...], mask: str) -> tuple[str, list[Span]]:
    """Join the parts of a plain text. Returns (text, spans to train on)."""
    text, spans = "", []
    for part, trained in parts:
        if trained or mask == "all":
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def trained_spans(sample: Sample, renderer: Renderer, mask: str, tokens: Tokens) -> TrainedSpans:
    """Render a chat and find the characters to train on. A turn's own `train` flag wins over the mask.

    Raises ValueError if the template does not show where a needed turn begins or ends, or does not write a text of the chat.
    """
    assistant = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    by_mask = {"assistant": assistant, "last": assistant[-1:], "all": []}[mask]
    # With mask=all the whole text is one span, and only the turns with train=false are looked for.
    included = [i for i, turn in enumerate(sample.turns) if turn.train or (turn.train is None and i in by_mask)]
    included = [] if mask == "all" else included
    excluded = [i for i, turn in enumerate(sample.turns) if turn.train is False] if mask == "all" else []
    answers = sorted({*included, *excluded} & set(assistant))
    text, marks = renderer.render(sample)
    chat = None
    if (answers and not renderer.has_marks) or not all(part in text for part in texts_of(sample)):
        with suppress(CannotMark):
            chat = MarkedChat(sample, text, renderer)
            _check_written(next(chat.missing(), None))
    if renderer.has_marks and mask == "assistant" and included == assistant:
        return TrainedSpans(text, marks, [])
    known: dict[int, Span] = {}
    if renderer.has_marks and answers:
        if len(marks) != len(assistant):
            raise ValueError(
                f"the chat template has {len(marks)} generation marks for {len(assistant)} assistant turns, "
                f"so a mark cannot be assigned to its turn: {REMEDY}"
            )
        known = dict(zip(assistant, marks, strict=True))
    elif chat:
        for number in answers:
            with suppress(CannotMark):
                if span := chat.span(number, tokens):
                    known[number] = span
    turns = {i: known.get(i) or _span_by_prefix(sample, i, text, renderer, tokens) for i in {*included, *excluded}}
    spans = [(0, len(text))] if mask == "all" else [turns[i] for i in included]
    return TrainedSpans(text, spans, [turns[i] for i in excluded])


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


def _span_by_prefix(sample: Sample, number: int, text: str, renderer: Renderer, tokens: Tokens) -> Span:
    """Characters of one turn: what is added to the text when the conversation ends after this turn instead of before it.

    For turns of other roles, and for answers that marks in the texts cannot find.
    """
    is_answer = sample.turns[number].role == "assistant"
    if number == 0 and is_answer:
        raise ValueError(
            "the first turn is the assistant's, and without generation marks its beginning is unknown: "
            f"begin with a user turn, or {REMEDY}"
        )
    before = renderer.render_prefix(sample, number, is_answer) if number else ""
    after = text if number + 1 == len(sample.turns) else renderer.render_prefix(sample, number + 1, False)
    if not (text.startswith(after) and after.startswith(before)):
        raise ValueError(
            f"the chat template rewrites earlier turns, so the beginning and end of turn {number} are unknown: {REMEDY}"
        )
    if is_answer:  # The newline that ChatML writes after <|im_end|> comes from the template, not from the model.
        stripped = after.rstrip()
        after = stripped if len(stripped) > len(before) and stripped.endswith(tokens.ends) else after
    return len(before), len(after)
