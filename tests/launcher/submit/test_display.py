"""launcher/submit/display.py and activity.py: what a local run shows on a terminal, and elsewhere."""

import json
import os
import pty
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.submit import display
from launcher.submit.activity import Activity
from launcher.submit.interrupts import Interrupts

SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let standard output lead to a terminal, and yield the other end. In the test itself: pytest replaces it after fixtures."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stdout, os.fdopen(ours, "rb"), monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        patch.delenv("NO_COLOR", raising=False)
        yield ours


def activity(run: Path, steps: int | None = 40, job: str = "train") -> Activity:
    attempt = run / f"jobs/{job}/attempt-1"
    attempt.mkdir(parents=True)
    return Activity(run, job, attempt, steps, memory_gib=79)


def write_step(run: Path, **values: object) -> None:
    line = {
        "step": 10,
        "loss": 2.5,
        "tokens_per_s": 9685.0,
        "memory_gib_max": 12.34,
        "left_s": 90,
        "time": time.time() + 1,
    }
    (run / "metrics.jsonl").write_text(json.dumps(line | values) + "\n")


def test_a_step_is_described(tmp_path: Path) -> None:
    shown = activity(tmp_path)
    assert str(shown) == "starting"
    write_step(tmp_path)
    shown.look()
    assert str(shown) == "step 10 of 40  loss 2.5000  9,685 tokens/s  left 0:01:30  memory 12.3 of 79 GiB"
    assert shown.share == 0.25


def test_steps_of_an_earlier_attempt_are_not_shown(tmp_path: Path) -> None:
    shown = activity(tmp_path)
    write_step(tmp_path, time=time.time() - 60)
    shown.look()
    assert str(shown) == "starting"


def test_the_number_of_steps_comes_from_the_log(tmp_path: Path) -> None:
    shown = activity(tmp_path, steps=None)
    assert not shown.read("step  0/141  held-out loss 7.2255  left 0:00:26")
    assert shown.steps == 141


def test_a_phase_and_a_bar_are_described(tmp_path: Path) -> None:
    shown = activity(tmp_path)
    beat = {"phase": "load", "step": 0, "count": 3, "time": time.time()}
    (tmp_path / "jobs/train/attempt-1/node-0.json").write_text(json.dumps({"ranks": {"0": beat}}))
    shown.look()
    assert str(shown) == "loading"
    assert shown.read("weights:  40%|####      | 6.4G/16.1G [00:05<00:07, 1.3GB/s]")
    assert (shown.share, str(shown)) == (0.4, "weights 40 % 6.4G/16.1G [00:05<00:07, 1.3GB/s]")
    assert not shown.read("warning   100%| of the rows have no answer")


def test_elsewhere_lines_have_the_time_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = display.of(["train"], Interrupts())
    shown.begin(activity(tmp_path))
    shown.line("attention sdpa")
    shown.line("weights:  40%|####      | 6.4G/16.1G [00:05<00:07, 1.3GB/s]")
    shown.tick()
    monkeypatch.setattr(display, "SILENT_S", 0)
    shown.tick()
    shown.end("completed")
    _, heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == "==== train"
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "TIME ", line) for line in lines] == [
        "TIME attention sdpa",
        "TIME train     weights 40 % 6.4G/16.1G [00:05<00:07, 1.3GB/s], 0:00:00",
    ]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_without_colors_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with terminal(monkeypatch):
        assert display.is_lively(sys.stdout)
        monkeypatch.setenv(name, value)
        assert type(display.of([], Interrupts())) is display.Plain


def test_a_terminal_shows_a_block_below_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as other_end:
        shown = display.of(["preprocess", "train", "consolidate"], Interrupts())
        shown.begin(activity(tmp_path))
        shown.line("attention sdpa")
        write_step(tmp_path)
        shown.tick()
        shown.note("train failed: why", "red")
        shown.end("failed")
        shown.close()
        text = ""
        while SHOW_CURSOR not in text:  # the last thing that is written
            text += os.read(other_end, 65536).decode()
    assert re.search(r"\d\d:\d\d:\d\d attention sdpa\r\n", text)
    assert "step 10 of 40" in text and "━" in text
    assert "preprocess \x1b[2mwaiting" in text
    assert "train \x1b[36mrunning" in text
    assert "train \x1b[31mfailed 0:00:00" in text
    assert "\x1b[31mtrain failed: why" in text
