"""Sums up every run below a folder: state, step, loss, time left and age. `muster ls` shows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from conf.errors import MusterError
from conf.jobs import RESUMABLE
from launcher import slurm
from launcher.run_folder import lock, record
from launcher.status import progress, state
from launcher.status.find import runs_below


@dataclass(frozen=True)
class Summary:
    """One run in a list."""

    run: Path
    state: str
    """failed, running, pending, completed, unknown or ended; with the job that it is about."""
    step: int | None = None
    """The last step of training; None before the first."""
    steps: int | None = None
    """The step with which training ends; None if that is not known yet, for a config that counts epochs."""
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
    launches: dict[Path, list[dict[str, Any]]] = {}
    started: dict[Path, dict[str, record.StartedJob]] = {}
    found = []
    for run in runs_below(folder):
        try:
            launches[run] = record.read_launches(run)
            started[run] = record.newest_jobs_of(run, launches[run])
        except (MusterError, OSError) as error:
            found.append(_unreadable(run, error))
    in_slurm = state.ask_slurm(started)
    for run, jobs in started.items():
        try:
            found.append(_summary(run, jobs, launches[run], in_slurm))
        except OSError as error:
            found.append(_unreadable(run, error))
    return sorted(found, key=lambda item: (item.launched or 0.0, item.run))


def _summary(
    run: Path,
    started: Mapping[str, record.StartedJob],
    launches: list[dict[str, Any]],
    in_slurm: Mapping[str, slurm.SlurmJob],
) -> Summary:
    jobs, training = state.states_of(run, started, in_slurm), progress.read(run)
    word = overall(jobs, is_held=lock.holder(run) is not None)
    is_training = any(job.name in RESUMABLE and job.state == "RUNNING" for job in jobs)
    left_s = training.left_s if is_training else None
    return Summary(run, word, training.step, training.steps, training.loss, left_s, _first_launch(launches))


def _unreadable(run: Path, error: Exception) -> Summary:
    return Summary(run, "closed to you" if isinstance(error, PermissionError) else str(error).splitlines()[0])


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


def _first_launch(launches: list[dict[str, Any]]) -> float | None:
    try:
        return datetime.strptime(launches[0]["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (LookupError, TypeError, ValueError):
        return None
