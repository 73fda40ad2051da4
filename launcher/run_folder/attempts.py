"""Reads what a job's attempts left behind: their verdicts, its newest checkpoint, and how far its metrics go."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.files import read_json
from conf.jobs import RESUMABLE


def last_verdict(folder: Path) -> dict[str, Any] | None:
    """The verdict of a job's newest attempt; None when there was none, or it ended without one."""
    number = newest(folder)
    found = read_json(folder / f"attempt-{number}.json") if number else None
    return found if isinstance(found, dict) else None


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """The verdicts of a job's attempts, oldest first."""
    found = {int(path.stem.removeprefix("attempt-")): read_json(path) for path in folder.glob("attempt-*.json")}
    return [found[number] | {"attempt": number} for number in sorted(found) if isinstance(found[number], dict)]


def opened(folder: Path, number: int | str) -> dict[str, Any]:
    """What was known when an attempt began; empty where it has not begun."""
    return read_json(folder / f"attempt-{number}" / "begin.json") or {}


def newest(folder: Path) -> int | None:
    """Number of the newest attempt of a job; None before the first."""
    numbers = (int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-*") if path.is_dir())
    return max(numbers, default=None)


def last_saved(folder: Path) -> int | None:
    """Step of the newest checkpoint; None where there is none, and for jobs that write none."""
    if folder.name not in RESUMABLE:
        return None
    names = (path.name.removeprefix("step-") for path in (folder.parent.parent / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; one that is being written is passed over."""
    found, path = [], run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_step(folder: Path) -> int | None:
    lines = metrics(folder.parent.parent) if folder.name in RESUMABLE else []
    return next((int(line["step"]) for line in reversed(lines) if "step" in line), None)


def gathered(attempt: Path) -> dict[int, dict[str, Any]]:
    """What the watchdogs of all nodes have written of their ranks, by rank."""
    found: dict[int, dict[str, Any]] = {}
    for path in attempt.glob("node-*.json"):
        with suppress(OSError, ValueError):
            found |= {int(rank): item for rank, item in (read_json(path) or {"ranks": {}})["ranks"].items()}
    return found
