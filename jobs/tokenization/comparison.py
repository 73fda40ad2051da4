"""Chooses the samples on which the fast and the slow way of the encoder are compared, so that this takes a second at most.

The comparison is a second proof. The first is in the fast ways themselves: they refuse every tokenizer, template and text for
which they cannot guarantee the tokens of the slow way. So it must meet every kind of sample, but not many of each. What decides
the choice is counted in samples and characters, not in seconds: the same rows are always compared in the same way.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest

from jobs.tokenization.conversation import Sample, Turn

MAX_SAMPLES, MAX_CHARACTERS = 100, 200_000
"""Compared in all. Of every kind at least one sample is compared, also above these limits."""
SAMPLE_TURNS, SAMPLE_CHARACTERS = 64, 20_000
"""Compared of one sample. Of a longer one, its beginning is compared: it is a sample too."""


def samples_to_compare(samples: Iterable[Sample]) -> list[Sample]:
    """Of these samples the first of each kind, then the second of each kind, and so on; long ones are cut."""
    kinds: dict[frozenset[str], list[Sample]] = {}
    for sample in samples:
        if (short := _beginning(sample)) is not None:
            kinds.setdefault(_kind(sample), []).append(short)
    in_turn = (sample for each in zip_longest(*kinds.values()) for sample in each if sample is not None)
    chosen: list[Sample] = []
    characters = 0
    for sample in in_turn:
        if len(chosen) >= len(kinds) and (len(chosen) >= MAX_SAMPLES or characters >= MAX_CHARACTERS):
            break
        chosen.append(sample)
        characters += _size(sample)
    return chosen


def _kind(sample: Sample) -> frozenset[str]:
    """What can lead a sample another way through a template or a tokenizer: its roles, its optional values, its characters."""
    if sample.ids is not None:
        return frozenset({"ids"})
    texts = [text for text, _ in sample.parts] + [turn.content for turn in sample.turns]
    optional = {
        "unusual characters": not all(map(str.isascii, texts)),
        "parts": bool(sample.parts),
        "tools": sample.tools is not None,
        "documents": sample.documents is not None,
        "template_kwargs": sample.template_kwargs is not None,
        "answer first": sample.turns[:1] != () and sample.turns[0].role == "assistant",
    }
    return frozenset(name for name, has in optional.items() if has).union(*map(_values, sample.turns))


def _values(turn: Turn) -> Iterator[str]:
    """The role of a turn, and the names of the values that it has."""
    yield turn.role
    for name, value in vars(turn).items():
        if name not in ("role", "content") and value != getattr(Turn, name):
            yield f"{turn.role}.{name}"


def _beginning(sample: Sample) -> Sample | None:
    """The sample, or as much of it as is compared. None if its first turn or its tools alone are longer."""
    if _size(sample) <= SAMPLE_CHARACTERS and len(sample.turns) <= SAMPLE_TURNS:
        return sample
    if sample.ids is not None:
        labels = sample.labels and sample.labels[:SAMPLE_CHARACTERS]
        return replace(sample, ids=sample.ids[:SAMPLE_CHARACTERS], labels=labels)
    left = SAMPLE_CHARACTERS - _size(replace(sample, turns=(), parts=()))
    parts, turns = list[tuple[str, bool]](), list[Turn]()
    for text, trained in sample.parts:
        parts += [(text[:left], trained)] if left > 0 else []
        left -= len(text)
    for turn in sample.turns[:SAMPLE_TURNS]:
        left -= _size_of_values(turn)
        if left <= 0:
            break
        is_cut = len(turn.content) > left
        turns.append(replace(turn, content=turn.content[:left], train_detail=()) if is_cut else turn)
        left -= len(turn.content)
    return replace(sample, parts=tuple(parts), turns=tuple(turns)) if parts or turns else None


def _size(sample: Sample) -> int:
    """Characters of a sample, or its token ids."""
    size = len(sample.ids or ()) + sum(len(text) for text, _ in sample.parts)
    size += sum(len(turn.content) + _size_of_values(turn) for turn in sample.turns)
    return size + _json_size(sample.tools) + _json_size(sample.documents)


def _size_of_values(turn: Turn) -> int:
    """Characters of what a turn has beside its content."""
    return len(turn.reasoning_content or "") + _json_size(turn.tool_calls) + _json_size(turn.extra)


def _json_size(value: object) -> int:
    return len(json.dumps(value, default=str)) if value else 0
