"""Reads what the attempts of a job left behind: verdicts, heartbeats, the newest checkpoint, and the metrics.

Every function that takes `folder` means the job's folder, RUN/jobs/JOB. A run may be somebody else's, so a file may hold anything:
what is not as Muster writes it counts as damaged, or as not there.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from conf import program_checkpoints
from conf.jobs import RESUMABLE
from launcher.run_folder.status import FAILED

NUMBER = re.compile(r"attempt-([1-9]\d{0,8})(?:\.json)?")
MAX_BYTES = 64 * 2**20
"""Bytes of the largest record that is read: no record of Muster comes near."""
LARGEST = 1e11
"""Larger numbers (and NaN) are no times, steps or sizes of a run; functions of dates would fail on them."""
TEXTS = ("reason", "remedy", "next", "error", "log", "host", "status")
"""Fields of a verdict that are texts."""


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is no such file, or if it holds something else."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _verdict(path: Path) -> dict[str, Any] | None:
    """Return a verdict with fields of the right types; one that says so if the file is damaged; None if there is no file."""
    if not path.exists():
        return None
    verdict = read_record(path) or {}
    if not isinstance(verdict.get("status"), str):
        return {"status": FAILED, "reason": f"{path.name} is damaged", "rank": None, "host": None}
    if "rank" in verdict:
        verdict.setdefault("host", None)
    wrong = [name for name in TEXTS if not isinstance(verdict.get(name) or "", str)]
    verdict |= {name: str(verdict[name])[:200] for name in wrong}
    numbers = ("rank", "step", "saved", "exit")
    return verdict | {name: None for name in numbers if name in verdict and not isinstance(verdict[name], int)}


def last_verdict(folder: Path) -> dict[str, Any] | None:
    """Return the verdict of the newest attempt; None if there is no attempt, or the newest has no verdict (yet)."""
    number = newest_attempt(folder)
    return _verdict(folder / f"attempt-{number}.json") if number else None


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """Return the verdicts of all attempts of a job, oldest first."""
    return _verdicts(folder, _entries(folder))


def history(folder: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """Return what `newest_attempt` and `verdicts` do, with one look at the folder: `muster ls` looks at thousands."""
    names = _entries(folder)
    return _newest(folder, names), _verdicts(folder, names)


def _verdicts(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    numbers = sorted(number for name in names if name.endswith(".json") and (number := _number(name)))
    found = ((number, _verdict(folder / f"attempt-{number}.json")) for number in numbers)
    return [verdict | {"attempt": number} for number, verdict in found if verdict]


def begin_record(folder: Path, number: int | str) -> dict[str, Any]:
    """Return what `attempt.begin` wrote when an attempt began (host, job id, time); empty if it has not begun."""
    return read_record(folder / f"attempt-{number}" / "begin.json") or {}


def gpu_seconds(folder: Path, newest: int | None, found: list[dict[str, Any]], *, is_live: bool) -> float | None:
    """Return GPUs times seconds of all attempts of a job; None if no attempt has recorded how many GPUs it had.

    `newest` and `found` are what `history` has returned. An attempt that was killed counts up to its last sign of life.
    """
    by_number = {verdict["attempt"]: verdict for verdict in found}
    total: float | None = None
    for attempt in range(1, (newest or 0) + 1):
        record = by_number.get(attempt) or begin_record(folder, attempt)
        began, gpus, ended = (number(record.get(name)) for name in ("started", "gpus", "ended"))
        if began is None or gpus is None:
            continue
        if ended is None and gpus:
            ended = time.time() if is_live and attempt == newest else last_sign(folder / f"attempt-{attempt}")
        total = (total or 0.0) + gpus * max(0.0, (ended or began) - began)
    return total


def last_sign(attempt: Path) -> float | None:
    """Return when an attempt last wrote a log, or published heartbeats, in seconds since 1970; None if it never did."""
    paths = (path for pattern in ("node-*.json", "rank-*.log") for path in attempt.glob(pattern))
    return max((path.stat().st_mtime for path in paths), default=None)


def newest_attempt(folder: Path) -> int | None:
    """Return the number of the newest attempt of a job; None before the first."""
    return _newest(folder, _entries(folder))


def _newest(folder: Path, names: list[str]) -> int | None:
    numbers = (number for name in names if (number := _number(name)) and not name.endswith(".json"))
    return next((number for number in sorted(numbers, reverse=True) if (folder / f"attempt-{number}").is_dir()), None)


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _number(name: str) -> int | None:
    match = NUMBER.fullmatch(name)
    return int(match[1]) if match else None


def newest_checkpoint(folder: Path) -> int | None:
    """Return the step of the run's newest checkpoint; None if there is none, or if this job writes no checkpoints."""
    if folder.name not in RESUMABLE:
        return None
    if folder.name == "custom":
        found = program_checkpoints.newest(folder.parent.parent / "checkpoints")
        return found[0] if found else None
    return max(checkpoints(folder.parent.parent), default=None)


def checkpoints(run: Path) -> dict[int, Path]:
    """Return the folder of each checkpoint of a run by its step, lowest step first."""
    named = {path.name.removeprefix("step-"): path for path in (run / "checkpoints").glob("step-*")}
    return dict(sorted((int(name), path) for name, path in named.items() if name.isdigit()))


def number(value: Any) -> float | None:
    """Return a number of a record; None for what is none, or none that a time, a step or a size can be."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return value


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl. Skips a line that is being written."""
    path = run / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [line for line in map(metrics_line, texts) if line is not None]


def metrics_line(text: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl; None for one that is being written, or that Muster did not write."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step", 0), int) else None


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
        try:
            found = (read_record(path) or {}).get("ranks")
        except OSError:  # skip a node whose file cannot be read: its ranks count as unknown
            continue
        for rank, heartbeat in found.items() if isinstance(found, dict) else ():
            if rank.isdecimal() and _is_heartbeat(heartbeat):
                ranks[int(rank)] = heartbeat
    return ranks


def _is_heartbeat(value: Any) -> bool:
    """Whether this has what is shown of a heartbeat. The watchdog, which reads all of it, reads only what it has written."""
    if not isinstance(value, dict) or not isinstance(value.get("phase"), str):
        return False
    return all(isinstance(value.get(name, 0), (int, float)) for name in ("count", "time"))
