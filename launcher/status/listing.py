"""Sums up every run below a folder: state, step, loss, time left and age. `muster ls` shows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import MusterError
from conf.jobs import RESUMABLE
from launcher import slurm
from launcher.run_folder import lock, record
from launcher.status import progress, scripts, state
from launcher.status.find import runs_below


@dataclass(frozen=True)
class Summary:
    """One run in a list."""

    run: Path
    state: str
    """failed, running, pending, unknown or ended, with the job that it is about; completed; ended early; not submitted."""
    step: int | None = None
    """The last step of training; None before the first."""
    steps: int | None = None
    """The step with which training ends; None if that is not known yet, for a config that counts epochs."""
    loss: float | None = None
    """Of the last step."""
    left_s: float | None = None
    """Seconds until the last step, for a run that trains; None if it does not."""
    gpu_hours: float | None = None
    """Of all attempts of all jobs, also of what restarts have lost; None if no attempt has recorded its GPUs."""
    launched: float | None = None
    """When the run was launched first, in seconds since 1970."""


def summaries(folder: Path) -> list[Summary]:
    """Every run in `folder`, or below it, the newest launch last. Slurm is asked once for all of them.

    A run whose records cannot be read has the reason as its state. Raises slurm.BusyError.
    """
    launches: dict[Path, list[dict[str, Any]]] = {}
    found = []
    for run in runs_below(folder):
        try:
            launches[run] = record.read_launches(run)
        except (MusterError, OSError) as error:
            found.append(_unreadable(run, error))
    closed: dict[Path, OSError] = {}
    for run, jobs in state.of_launches(launches, closed=closed).items():
        try:
            found.append(_summary(run, launches[run], jobs))
        except OSError as error:
            closed[run] = error
    found += [_unreadable(run, error) for run, error in closed.items()]
    return sorted(found, key=lambda item: (item.launched or 0.0, item.run))


def _summary(run: Path, launches: list[dict[str, Any]], jobs: list[state.JobState]) -> Summary:
    training = progress.read(run)
    to_submit = scripts.submit_command(run, scripts.not_submitted(run, launches, jobs))
    word = overall(jobs, is_held=lock.holder(run) is not None, to_submit=to_submit)
    is_training = any(job.name in RESUMABLE and job.state == "RUNNING" for job in jobs)
    gpu_s = [job.gpu_s for job in jobs if job.gpu_s is not None]
    return Summary(
        run,
        word,
        training.step,
        training.steps,
        training.loss,
        training.left_s if is_training else None,
        sum(gpu_s) / 3600 if gpu_s else None,
        record.launched_at(launches[0]) if launches else None,
    )


def _unreadable(run: Path, error: Exception) -> Summary:
    return Summary(run, "closed to you" if isinstance(error, PermissionError) else str(error).splitlines()[0])


def overall(jobs: list[state.JobState], *, is_held: bool, to_submit: str = "") -> str:
    """The state of a run, from its jobs. `is_held`: a launch on some machine is starting jobs of the run.

    `to_submit`: the command that submits the scripts which wait for the user.
    """
    for job in jobs:
        if job.failed and job.verdict:
            return f"{job.verdict['status']} {job.name}"
    for states, word in (({"RUNNING", "COMPLETING"}, "running"), (slurm.LIVE_STATES, "pending")):
        if live := next((job for job in jobs if job.state in states), None):
            return f"{word} {live.name}"
    if is_held:
        return "running"
    if to_submit:
        return f"not submitted: {to_submit}"
    if unknown := next((job for job in jobs if job.verdict is None), None):
        return f"{'unknown' if unknown.state == 'UNKNOWN' else 'ended'} {unknown.name}"
    if any(job.verdict and job.verdict.get("ended_early") is True for job in jobs):
        return "ended early"
    return "completed" if jobs else "no job"
