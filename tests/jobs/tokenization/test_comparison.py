"""jobs/tokenization/comparison.py: every kind of sample is compared, and long ones do not take long."""

from dataclasses import replace
from typing import Any

import pytest

from jobs.tokenization import comparison
from jobs.tokenization.comparison import SAMPLE_CHARACTERS, SAMPLE_TURNS, samples_to_compare
from jobs.tokenization.conversation import Sample, Turn

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASK, SAY = Turn("user", "Is it warm?"), Turn("assistant", "Yes.")
CHAT = Sample(turns=(ASK, SAY))


def test_few_short_samples_are_all_compared() -> None:
    samples = [Sample(turns=(Turn("user", str(number)), SAY)) for number in range(90)]
    assert samples_to_compare(samples) == samples


def test_many_samples_are_not_all_compared() -> None:
    assert samples_to_compare([CHAT] * 300) == [CHAT] * comparison.MAX_SAMPLES
    long = Sample(parts=(("a b " * 2_500, True),))
    assert samples_to_compare([long] * 300) == [long] * (comparison.MAX_CHARACTERS // 10_000)


RARE = {
    "tools": replace(CHAT, tools=[{"type": "function", "function": {"name": "weather"}}]),
    "calls": Sample(turns=(ASK, Turn("assistant", "", [CALL]), Turn("tool", "3"), SAY)),
    "thoughts": Sample(turns=(ASK, replace(SAY, reasoning_content="It is July."))),
    "a system turn": Sample(turns=(Turn("system", "Be brief."), ASK, SAY)),
    "a turn that is not trained": Sample(turns=(ASK, replace(SAY, train=False))),
    "a null content": Sample(turns=(ASK, replace(SAY, content="", tool_calls=[CALL], is_null=True))),
    "other characters": Sample(turns=(ASK, Turn("assistant", "Ça va, 好"))),
    "documents": replace(CHAT, documents=[{"title": "a", "text": "b"}]),
    "variables": replace(CHAT, template_kwargs={"enable_thinking": False}),
    "an answer first": Sample(turns=(SAY, ASK, SAY)),
    "text": Sample(parts=(("once", True),)),
    "token ids": Sample(ids=(1, 2)),
}


@pytest.mark.parametrize("rare", RARE.values(), ids=RARE)
def test_a_kind_that_comes_late_is_compared(rare: Sample) -> None:
    chosen = samples_to_compare([CHAT] * 299 + [rare])
    assert rare in chosen
    assert len(chosen) == comparison.MAX_SAMPLES


def test_every_kind_is_compared_above_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MAX_SAMPLES", 2)
    monkeypatch.setattr(comparison, "MAX_CHARACTERS", 2)
    assert samples_to_compare([CHAT, CHAT, *RARE.values()]) == [CHAT, *RARE.values()]


LONG: dict[str, tuple[Sample, Sample | None]] = {
    "turns": (Sample(turns=(ASK, SAY) * 2_000), Sample(turns=(ASK, SAY) * (SAMPLE_TURNS // 2))),
    "a text": (Sample(parts=(("x" * 10**7, True),)), Sample(parts=(("x" * SAMPLE_CHARACTERS, True),))),
    "the second text": (
        Sample(parts=(("question", False), ("x" * 10**7, True), ("more", True))),
        Sample(parts=(("question", False), ("x" * (SAMPLE_CHARACTERS - 8), True))),
    ),
    "an answer": (
        Sample(turns=(Turn("user", "question"), Turn("assistant", "x" * 10**7, train_detail=((0, 10**6, True),)), ASK)),
        Sample(turns=(Turn("user", "question"), Turn("assistant", "x" * (SAMPLE_CHARACTERS - 8)))),
    ),
    "a call": (
        Sample(turns=(ASK, Turn("assistant", "", [{"function": {"name": "f", "arguments": {"a": "x" * 10**6}}}]))),
        Sample(turns=(ASK,)),
    ),
    "token ids": (
        Sample(ids=(1,) * 10**6, labels=(1,) * 10**6),
        Sample(ids=(1,) * SAMPLE_CHARACTERS, labels=(1,) * SAMPLE_CHARACTERS),
    ),
    "the tools": (replace(CHAT, tools=[{"function": {"name": "x" * 10**6}}]), None),
    "the thought of the first turn": (Sample(turns=(replace(SAY, reasoning_content="x" * 10**6),)), None),
}


@pytest.mark.parametrize(("long", "compared"), LONG.values(), ids=LONG)
def test_of_a_long_sample_the_beginning_is_compared(long: Sample, compared: Sample | None) -> None:
    assert samples_to_compare([long]) == ([] if compared is None else [compared])


def test_a_kind_of_long_samples_does_not_hide_the_others() -> None:
    too_long: Any = LONG["the tools"][0]
    assert samples_to_compare([too_long, CHAT]) == [CHAT]
