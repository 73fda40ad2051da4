"""Sums up every run below a folder: state, step, loss, time left and age. `muster ls` shows it."""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from conf.errors import MusterError
from launcher import slurm
from launcher.run_folder import lock, record
from launcher.run_folder.attempts import metrics_line
from launcher.status import state

TAIL_BYTES = 2**15
"""Read from the end of metrics.jsonl, which has a line for every step."""
DEEPEST = 3
"""Levels of folders in which runs are looked for: RUN, SWEEP/RUN, PROJECT/SWEEP/RUN."""
_STEPS = re.compile(r"^train:\n(?:[ #].*\n|\n)*?  steps: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Summary:
    """One run in a list."""

    run: Path
    state: str
    """failed, running, pending, completed, unknown or ended; with the job that it is about."""
    step: int | None = None
    """The last step of training; None before the first."""
    steps: int | None = None
    """The steps that the config asks for; None if it counts epochs."""
    loss: float | None = None
    """Of the last step."""
    left_s: float | None = None
    """Seconds until the last step, for a run that trains; None if it does not."""
    launched: float | None = None
    """When the run was launched first, in seconds since 1970."""


def summaries(folder: Path) -> list[Summary]:
    """Every run in `folder`, or below it, the newest launch last. Slurm is asked once for all of them.

    A run whose records cannot be read has the reason as its state. Raises slurm.BusyError.
    """
    started: dict[Path, dict[str, record.StartedJob] | str] = {}
    for run in runs_below(folder):
        try:
            started[run] = record.newest_jobs(run)
        except (MusterError, OSError) as error:
            started[run] = str(error).splitlines()[0]
    jobs = [job for found in started.values() if isinstance(found, dict) for job in found.values()]
    owners = {owner for run in started if (owner := record.other_owner(run))}
    in_slurm = slurm.jobs([job.job_id for job in jobs if job.cluster == "slurm"], ",".join(sorted(owners)) or None)
    found = [
        Summary(run, jobs_of_run) if isinstance(jobs_of_run, str) else _summary(run, jobs_of_run, in_slurm)
        for run, jobs_of_run in started.items()
    ]
    return sorted(found, key=lambda item: (item.launched or 0.0, item.run))


def runs_below(folder: Path, levels: int = DEEPEST) -> Iterator[Path]:
    """The run folders in `folder`: itself, or those below it."""
    if (folder / "run.json").is_file():
        yield folder
        return
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inside if levels else []:
        yield from runs_below(path, levels - 1)


def _summary(run: Path, started: dict[str, record.StartedJob], in_slurm: dict[str, slurm.SlurmJob]) -> Summary:
    jobs = state.states_of(run, started, in_slurm)
    last, launched = last_step(run), _first_launch(run)
    word = overall(jobs, is_held=lock.holder(run) is not None)
    trains = word.startswith("running") and last.get("left_s") is not None
    left_s = max(0.0, last["left_s"] - (time.time() - _changed(run / "metrics.jsonl"))) if trains else None
    return Summary(run, word, last.get("step"), _steps(run), last.get("loss"), left_s, launched)


def overall(jobs: list[state.JobState], *, is_held: bool) -> str:
    """The state of a run, from its jobs. `is_held`: a launch on some machine is starting jobs of the run."""
    for job in jobs:
        if job.failed and job.verdict:
            return f"{job.verdict['status']} {job.name}"
    for states, word in (({"RUNNING", "COMPLETING"}, "running"), (slurm.LIVE_STATES, "pending")):
        if live := next((job for job in jobs if job.state in states), None):
            return f"{word} {live.name}"
    if is_held:
        return "running"
    if unknown := next((job for job in jobs if job.verdict is None), None):
        return f"{'unknown' if unknown.state == 'UNKNOWN' else 'ended'} {unknown.name}"
    return "completed" if jobs else "no job"


def last_step(run: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that has a loss; empty before the first step."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in map(metrics_line, reversed(lines)):
        if line and "step" in line and isinstance(line.get("loss"), float):
            return line if isinstance(line.get("left_s"), int | float) else line | {"left_s": None}
    return {}


def _steps(run: Path) -> int | None:
    try:
        found = _STEPS.search((run / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None


def _first_launch(run: Path) -> float | None:
    launches = record.read_launches(run)
    try:
        return datetime.strptime(launches[0]["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (LookupError, TypeError, ValueError):
        return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
