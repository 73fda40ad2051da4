"""Which characters of a rendered sample are trained on: assistant turns, the last one, or everything."""

import re
from typing import Protocol

from jobs.tokenization.chat_template import NAMED
from jobs.tokenization.conversation import Sample
from jobs.tokenization.offsets import Span

MASKS = ("assistant", "last", "all")


MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


REMEDY = f"use a template with generation marks, such as one of {', '.join(NAMED)}"


class Renderer(Protocol):
    """A chat template at work."""

    marked: bool
    """Whether the template has generation marks."""

    def whole(self, sample: Sample) -> tuple[str, list[Span]]:
        """All turns as text, and the stretches between the template's generation marks, in order."""

    def first(self, sample: Sample, turns: int, prompt: bool) -> str:
        """The first turns as text."""


def check_mask(mask: str) -> None:
    if mask not in MASKS:
        raise ValueError(f"mask {mask!r} is unknown: use one of {', '.join(MASKS)}")


def joined(parts: tuple[tuple[str, bool], ...], mask: str) -> tuple[str, list[Span]]:
    """(the text of the parts, what is learnt of it)."""
    text, spans = "", []
    for part, learnt in parts:
        if learnt or mask == "all":
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def learnt(sample: Sample, renderer: Renderer, mask: str, ends: tuple[str, ...]) -> tuple[str, list[Span], list[Span]]:
    """(rendered text, what is learnt of it, what is taken out of that again). ends: the tokens that end a turn."""
    assistant = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    wanted = {"assistant": assistant, "last": assistant[-1:], "all": []}[mask]
    yes = [i for i, turn in enumerate(sample.turns) if turn.train or (turn.train is None and i in wanted)]
    yes = [] if mask == "all" else yes
    no = [i for i, turn in enumerate(sample.turns) if turn.train is False] if mask == "all" else []
    text, marks = renderer.whole(sample)
    if renderer.marked and mask == "assistant" and yes == assistant:
        return text, marks, []
    found: dict[int, Span] = {}
    if renderer.marked and set(assistant) & {*yes, *no}:
        if len(marks) != len(assistant):
            raise ValueError(
                f"the chat template marks {len(marks)} stretches for {len(assistant)} assistant turns, "
                f"so which is whose cannot be told: {REMEDY}"
            )
        found = dict(zip(assistant, marks, strict=True))
    spans = {i: found.get(i) or _prefix_span(sample, i, text, renderer, ends) for i in {*yes, *no}}
    return text, [(0, len(text))] if mask == "all" else [spans[i] for i in yes], [spans[i] for i in no]


def _prefix_span(sample: Sample, number: int, text: str, renderer: Renderer, ends: tuple[str, ...]) -> Span:
    """Where a turn stands in the text: between what the template writes without it, and with it, when nothing follows."""
    answer = sample.turns[number].role == "assistant"
    if number == 0 and answer:
        raise ValueError(
            f"the first turn is the assistant's, and the template has no marks: begin with a user turn, or {REMEDY}"
        )
    before = renderer.first(sample, number, answer) if number else ""
    after = text if number + 1 == len(sample.turns) else renderer.first(sample, number + 1, False)
    if not (text.startswith(after) and after.startswith(before)):
        raise ValueError(
            f"the chat template rewrites earlier turns, so the bounds of turn {number} cannot be told: {REMEDY}"
        )
    if answer:  # the line end that ChatML writes after <|im_end|> is the template's, not the model's
        bare = after.rstrip()
        after = bare if len(bare) > len(before) and bare.endswith(ends) else after
    return len(before), len(after)
