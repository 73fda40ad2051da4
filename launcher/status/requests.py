"""Asks the jobs of a run for something: to end at once, to save and end, or to save and go on."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from conf.errors import Problem, RunError, SiteError
from conf.files import write_text
from conf.jobs import RESUMABLE
from launcher import slurm
from launcher.run_folder import lock, record
from launcher.run_folder.status import STOPPED
from launcher.status import state
from launcher.supervise import attempt


def cancel(run: Path, name: str | None = None) -> list[str]:
    """End the pending and running jobs of a run, or only the one called `name`, on Slurm and on this machine. Returns their names.

    Raises RunError if they are another user's or on another host, or if there is no such job, and SlurmError if Slurm does not
    say which jobs still run.
    """
    started = record.newest_jobs(run)
    if any(job.cluster == "slurm" for job in started.values()) and not slurm.installed():
        raise SiteError(Problem("RUN", run, "is a run on Slurm, and squeue is not on PATH. Type this on a login node"))
    holder = lock.holder(run)
    if state.is_elsewhere(holder):
        raise RunError(Problem("RUN", run, f"is used by {holder}. Type this there"))
    jobs = state.job_states(run, strict=True)
    live = [job for job in jobs if job.state in slurm.LIVE_STATES]
    others = state.unrecorded_jobs(run, jobs)
    if name is not None:
        live, others = _only(name, live), []
    for job in live:
        owner = job.user if job.cluster == "slurm" else record.other_owner(run)
        if owner and os.getuid() != 0 and owner != record.user_name(os.getuid()):
            raise RunError(
                Problem("RUN", run, f"{job.name} {job.job_id} is a job of {owner}: only {owner} can cancel it")
            )
    slurm_ids = [job.job_id for job in live if job.cluster == "slurm"] + [job.job_id for job in others]
    if slurm_ids:
        slurm.cancel(slurm_ids)
    for job in live:
        if job.cluster != "slurm":
            _end_here(run / "jobs" / job.name, job)
    return [job.name for job in live] + [job.name for job in others]


def _end_here(folder: Path, job: state.JobState) -> None:
    """End a job on this machine at once, with its ranks, and record why."""
    if job.attempt is not None:
        attempt.record_end(folder, job.attempt, 0, STOPPED, "cancelled by muster cancel, without saving")
    with suppress(ProcessLookupError):
        os.killpg(int(job.job_id), signal.SIGKILL)


def _only(name: str, live: Sequence[state.JobState]) -> list[state.JobState]:
    """Return the live job with this name. Raises RunError, which lists those that are live."""
    if found := [job for job in live if job.name == name]:
        return found
    others = f"these are: {', '.join(job.name for job in live)}" if live else "nor is any other job of the run"
    raise RunError(Problem("JOB", name, f"is not pending or running; {others}"))


def stop(run: Path) -> Path:
    """Ask the run's training to save and end, by a file that it looks for; works without Slurm. Returns the file.

    Raises RunError if no training is running, and SlurmError if Slurm does not say so.
    """
    return _ask(run, "stop")


def save(run: Path) -> Path:
    """Ask the run's training to save a checkpoint and go on, by a file that it removes. Returns the file. Raises as `stop` does.

    A program of the user saves when it wants, so RunError is raised for it too.
    """
    if state.training_job(run) == "custom":
        remedy = "your own program decides when it saves; muster stop RUN asks it to save and end"
        raise RunError(Problem("RUN", run, remedy))
    return _ask(run, "save")


def _ask(run: Path, request: str) -> Path:
    job = next((job for job in state.job_states(run, strict=True) if job.name in RESUMABLE), None)
    if job is None or job.state != "RUNNING":
        seen = "no job" if job is None else job.state.lower()
        raise RunError(
            Problem("RUN", run, f"training is not running ({seen}). To end pending jobs: muster cancel {run}")
        )
    path = run / "jobs" / job.name / request
    write_text(path, "")
    return path
