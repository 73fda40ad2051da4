"""Reads what the attempts of a job left behind: verdicts, heartbeats, the newest checkpoint, and the metrics.

Every function that takes `folder` means the job's folder, RUN/jobs/JOB.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.files import read_json
from conf.jobs import RESUMABLE
from conf.program_checkpoints import numbered


def last_verdict(folder: Path) -> dict[str, Any] | None:
    """Return the verdict of the newest attempt; None if there is no attempt, or the newest has no verdict (yet)."""
    number = newest_attempt(folder)
    verdict = read_json(folder / f"attempt-{number}.json") if number else None
    return verdict if isinstance(verdict, dict) else None


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """Return the verdicts of all attempts of a job, oldest first."""
    by_number = {int(path.stem.removeprefix("attempt-")): read_json(path) for path in folder.glob("attempt-*.json")}
    return [verdict | {"attempt": number} for number, verdict in sorted(by_number.items()) if isinstance(verdict, dict)]


def begin_record(folder: Path, number: int | str) -> dict[str, Any]:
    """Return what `attempt.begin` wrote when an attempt began (host, job id, time); empty if it has not begun."""
    return read_json(folder / f"attempt-{number}" / "begin.json") or {}


def newest_attempt(folder: Path) -> int | None:
    """Return the number of the newest attempt of a job; None before the first."""
    numbers = (int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-*") if path.is_dir())
    return max(numbers, default=None)


def newest_checkpoint(folder: Path) -> int | None:
    """Return the step of the run's newest checkpoint; None if there is none, or if this job writes no checkpoints."""
    if folder.name not in RESUMABLE:
        return None
    if folder.name == "custom":
        return max((number for number, _ in numbered(folder.parent.parent / "checkpoints")), default=None)
    names = (path.name.removeprefix("step-") for path in (folder.parent.parent / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl. Skips a line that is being written."""
    lines, path = [], run / "metrics.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def last_step(folder: Path) -> int | None:
    """Return the last training step in metrics.jsonl; None if there is none, or if this job does not train.

    That of a program of the user is the one that it gave to `muster.beat`, or else the number of its newest checkpoint.
    """
    if folder.name == "custom":
        beats = published_ranks(folder / f"attempt-{newest_attempt(folder)}").values()
        return max((int(beat["step"]) for beat in beats if beat.get("step")), default=newest_checkpoint(folder))
    lines = metrics(folder.parent.parent) if folder.name in RESUMABLE else []
    return next((int(line["step"]) for line in reversed(lines) if "step" in line), None)


def published_ranks(attempt: Path) -> dict[int, dict[str, Any]]:
    """Return, by rank, the last heartbeat that the watchdogs of all nodes have published in the attempt's folder."""
    ranks: dict[int, dict[str, Any]] = {}
    for path in attempt.glob("node-*.json"):
        with suppress(OSError, ValueError):  # skip a node whose file cannot be read: its ranks count as unknown
            ranks |= {int(rank): heartbeat for rank, heartbeat in (read_json(path) or {"ranks": {}})["ranks"].items()}
    return ranks
