"""Decides which characters of a sample are trained on: all assistant turns, the last one, or the whole text."""

import re
from typing import NamedTuple

from conf.chat_templates import BUNDLED
from jobs.tokenization import template_inputs
from jobs.tokenization.chat_settings import ChatSettings
from jobs.tokenization.conversation import Sample
from jobs.tokenization.offsets import Span
from jobs.tokenization.template_inputs import RenderedChat, Renderer
from jobs.tokenization.text_marks import CannotMark, MixedTurns
from jobs.tokenization.turn_spans import MarkedChat, Tokens

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Opens a block that transformers reports as written by the assistant (`return_assistant_tokens_mask`)."""

REMEDY = f"use a template with {{% generation %}} marks, such as one of {', '.join(BUNDLED)}"


class TrainedSpans(NamedTuple):
    """Characters of a rendered sample to train on: `spans` without `excluded`."""

    text: str
    spans: list[Span]
    excluded: list[Span]


def join_parts(parts: tuple[tuple[str, bool], ...], mask: str) -> tuple[str, list[Span]]:
    """Join the parts of a plain text. Returns (text, spans to train on)."""
    text, spans = "", []
    for part, trained in parts:
        if trained or mask == "all":
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def trained_spans(sample: Sample, renderer: Renderer, settings: ChatSettings, tokens: Tokens) -> TrainedSpans:
    """Render a chat and find the characters to train on. A turn's own `train` flag wins over the mask.

    Raises ValueError if the template does not show where a needed turn begins or ends, or does not write a text of the chat.
    """
    chat = template_inputs.render(sample, renderer)
    answers = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    chosen, unchosen = _choose_turns(sample, settings)
    _refuse_ends_inside(sample, chosen, tokens)
    detailed = any(turn.train_detail for turn in sample.turns)
    last = len(sample.turns) - 1
    ends_with_answer = last in chosen or (settings.mask == "all" and last not in unchosen)
    end = _unwritten_end(chat, settings, tokens) if ends_with_answer and sample.turns[last].role == "assistant" else ""
    if renderer.has_marks and chosen == answers and not detailed and settings.train_on_end == "turn":
        text, spans, excluded = TrainedSpans(chat.text, [*chat.generation_spans], [])
    else:
        text, spans, excluded = _find_spans(chat, chosen, unchosen, settings, tokens, has_end=not end)
    return TrainedSpans(text + end, spans + ([(len(text), len(text + end))] if end else []), excluded)


def _choose_turns(sample: Sample, settings: ChatSettings) -> tuple[list[int], list[int]]:
    """(numbers of the turns to train on, of those to leave out of the whole text).

    With mask=all the first list is empty, because the whole text is one span. Otherwise the second list is empty.
    """
    turns = list(enumerate(sample.turns))
    if settings.mask == "all":
        return [], [number for number, turn in turns if turn.train is False or turn.train_detail]
    by_role = [number for number, turn in turns if turn.role in settings.train_on]
    by_mask = set(by_role if settings.mask == "assistant" else by_role[-1:])
    return [number for number, turn in turns if (number in by_mask if turn.train is None else turn.train)], []


def _refuse_ends_inside(sample: Sample, chosen: list[int], tokens: Tokens) -> None:
    """Raise ValueError if a trained text has a token that ends a turn: the model would learn to stop there, or twice."""
    for number in chosen:
        for key in ("content", "reasoning_content"):
            text = getattr(sample.turns[number], key) or ""
            if found := next((end for end in tokens.ends if end and end in text), None):
                raise ValueError(
                    f"messages[{number}].{key} has {found}, the token that ends a turn, and the chat template writes it as well: "
                    "remove it from the text, or do not train on this message"
                )


def _find_spans(
    chat: RenderedChat,
    chosen: list[int],
    unchosen: list[int],
    settings: ChatSettings,
    tokens: Tokens,
    *,
    has_end: bool,
) -> TrainedSpans:
    """has_end: whether the rendering has the token that ends the chat."""
    turns, finder = chat.sample.turns, _TurnFinder(chat, tokens)
    spans: list[Span] = [(0, len(chat.text))] if settings.mask == "all" else []
    excluded: list[Span] = []
    for number in chosen:
        spans += finder.detail(number) if turns[number].train_detail else finder.span(number)
    for number in unchosen:
        excluded += _subtract(finder.span(number), finder.detail(number) if turns[number].train_detail else [])
    if settings.train_on_end != "turn":
        ends = [end for number in range(len(turns)) for end in finder.end(number)]
        trained = {"all": ends, "last": ends[-1:] if has_end else [], "none": []}[settings.train_on_end]
        spans += trained
        excluded = [*_subtract(excluded, trained), *(end for end in ends if end not in trained)]
    return TrainedSpans(chat.text, spans, excluded)


def _subtract(spans: list[Span], holes: list[Span]) -> list[Span]:
    """The spans without the characters of the holes."""
    for begin, end in holes:
        parts = [part for first, last in spans for part in ((first, min(last, begin)), (max(first, end), last))]
        spans = [(first, last) for first, last in parts if first < last]
    return spans


def _unwritten_end(chat: RenderedChat, settings: ChatSettings, tokens: Tokens) -> str:
    """The token that ends the last answer, if the template writes none and the token is known; else an empty text.

    GLM's answers end with the token that begins the next turn, which the text of a chat that ends here does not have.
    """
    if settings.train_on_end == "none" or chat.text.rstrip().endswith(tokens.ends):
        return ""
    if settings.end_of_turn:
        return settings.end_of_turn[0]
    return tokens.next_role(after_call=bool(chat.sample.turns[-1].tool_calls)) or ""


class _TurnFinder:
    """Finds turns, their contents and their ends in a rendered chat. Every method raises ValueError where it cannot."""

    def __init__(self, chat: RenderedChat, tokens: Tokens) -> None:
        self._chat, self._tokens = chat, tokens
        self._answers = [number for number, turn in enumerate(chat.sample.turns) if turn.role == "assistant"]

    def span(self, number: int) -> list[Span]:
        """The characters of a turn that its author writes; none if it has no text."""
        if number not in self._answers:
            span = self._marked(number).texts_of_turn(number, self._tokens)
            return [span] if span else []
        if self._chat.renderer.has_marks:
            return [self._by_generation_marks(number)]
        mixed: CannotMark | None = None
        try:
            if span := self._chat.marked().span(number, self._tokens):
                return [span]
        except CannotMark as error:
            mixed = error if isinstance(error, MixedTurns) else None
        try:
            return [_span_by_prefix(self._chat, number, self._tokens)]
        except ValueError:
            if mixed is None:
                raise
            raise ValueError(
                f"the chat template does not write messages[{number}] in one piece, for example its text behind the results "
                "of its calls, so its end is unknown: drop the text beside the calls, or use another template"
            ) from mixed

    def detail(self, number: int) -> list[Span]:
        """The characters of a turn that its `train_detail` names, and the token that ends it."""
        chat = self._marked(number)
        detail = self._chat.sample.turns[number].train_detail
        trained = [span for begin, end, yes in detail if yes for span in chat.content_spans(number, begin, end)]
        return [*trained, *self.end(number)]

    def end(self, number: int) -> list[Span]:
        """The token that ends a turn; none if the template writes none."""
        end = self._marked(number).end(number, self._tokens)
        return [end] if end else []

    def _marked(self, number: int) -> MarkedChat:
        try:
            return self._chat.marked()
        except CannotMark as error:
            raise ValueError(
                f"{error}, so the beginning and end of messages[{number}] are unknown: use another template, "
                "or train on whole answers (data.train_on=[assistant], data.train_on_end=turn)"
            ) from error

    def _by_generation_marks(self, number: int) -> Span:
        marks, answers = self._chat.generation_spans, self._answers
        if len(marks) != len(answers):
            raise ValueError(
                f"the chat template has {len(marks)} generation marks for {len(answers)} assistant turns, "
                f"so a mark cannot be assigned to its turn: {REMEDY}"
            )
        return marks[answers.index(number)]


def _span_by_prefix(chat: RenderedChat, number: int, tokens: Tokens) -> Span:
    """Characters of an answer: what is added to the text when the chat ends after this turn instead of before it.

    For answers that marks in the texts cannot find.
    """
    sample, text, renderer = chat.sample, chat.text, chat.renderer
    if number == 0:
        raise ValueError(
            "the first turn is the assistant's, and without generation marks its beginning is unknown: "
            f"begin with a user turn, or {REMEDY}"
        )
    before = renderer.render_prefix(sample, number, True)
    after = text if number + 1 == len(sample.turns) else renderer.render_prefix(sample, number + 1, False)
    if not (text.startswith(after) and after.startswith(before)):
        raise ValueError(
            f"the chat template rewrites earlier turns, so the beginning and end of turn {number} are unknown: {REMEDY}"
        )
    stripped = (
        after.rstrip()
    )  # The newline that ChatML writes after <|im_end|> comes from the template, not from the model.
    after = stripped if len(stripped) > len(before) and stripped.endswith(tokens.ends) else after
    return len(before), len(after)
