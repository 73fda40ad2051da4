"""Reads how far a training is: its last step, loss, speed and the time left, from the end of metrics.jsonl."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.run_folder.attempts import metrics_line, number

TAIL_BYTES = 2**15
"""Read from the end of metrics.jsonl, which has a line for every step."""
_STEPS = re.compile(r"^train:\n(?:[ #].*\n|\n)*?  steps: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    step: int | None = None
    """The last step; None before the first."""
    steps: int | None = None
    """The step with which it ends; None if that is not known yet, for a config that counts epochs."""
    loss: float | None = None
    """Of the last step."""
    tokens_per_s: float | None = None
    """In the last step, of all ranks."""
    left_s: float | None = None
    """Seconds from now until the last step, if training goes on as fast as before."""


def read(run: Path) -> Progress:
    """Return the progress of the run's training, also if it has ended."""
    last: dict[str, Any] | None = None
    timed: dict[str, Any] = {}
    for line in _last_lines(run):
        if number(line.get("loss")) is None:  # of an evaluation
            continue
        last = last or line
        if number(line.get("left_s")) is not None:  # it is written every few steps
            timed = line
            break
    if last is None:
        return Progress(steps=_configured_steps(run))
    left_s = number(timed.get("left_s"))
    if left_s is not None:
        left_s = max(0.0, left_s - (time.time() - (number(timed.get("time")) or _changed(run / "metrics.jsonl"))))
    steps = timed.get("steps")
    return Progress(
        last["step"],
        steps if isinstance(steps, int) and number(steps) is not None else _configured_steps(run),
        number(last["loss"]),
        number(last.get("tokens_per_s")),
        left_s,
    )


def newest_line(run: Path) -> dict[str, Any]:
    """Return the newest line of metrics.jsonl that has a loss; empty before the first step."""
    return next((line for line in _last_lines(run) if number(line.get("loss")) is not None), {})


def _last_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the last lines of metrics.jsonl that are of a step, the newest first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            texts = file.read().decode(errors="replace").splitlines()
    except OSError:
        return
    yield from (line for line in map(metrics_line, reversed(texts)) if line and "step" in line)


def _configured_steps(run: Path) -> int | None:
    try:
        found = _STEPS.search((run / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
