"""Looks at the runs of a sweep together, and ends them together. `folder` is always the folder of the sweep."""

import os
import shlex
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conf.errors import Problem, RunError
from conf.jobs import AFTER_TRAINING, RESUMABLE
from launcher import slurm
from launcher.run_folder import attempts, lock, record, sweep_record
from launcher.status import find, overview, requests, state


@dataclass(frozen=True)
class SweepState:
    """What the jobs of a sweep are doing."""

    runs: dict[Path, list[state.JobState]]
    """The jobs of each run that has been started."""
    later: dict[str, slurm.SlurmJob]
    """The Slurm jobs that wait for the end of all trainings, by name."""
    is_held: bool = False
    """Whether a launch is running the sweep on some machine, or starting its jobs."""

    @property
    def is_live(self) -> bool:
        """Whether a job is pending or running, or a launch is running them on this machine."""
        states = [job.state for jobs in self.runs.values() for job in jobs] + [job.state for job in self.later.values()]
        return self.is_held or any(item in slurm.LIVE_STATES for item in states) or any(map(lock.holder, self.runs))

    @property
    def notes(self) -> list[str]:
        """Why Slurm gave no answer."""
        return [job.note for jobs in self.runs.values() for job in jobs if job.is_silent]

    @property
    def failed(self) -> list[Path]:
        """The runs of which a job has failed."""
        return [run for run, jobs in self.runs.items() if any(job.failed for job in jobs)]


def look(folder: Path) -> SweepState:
    """Return the state of all jobs of a sweep. Slurm is asked once."""
    started = {run: record.newest_jobs(run) for run in find.each_run([folder])}
    later = sweep_record.jobs(folder)
    ids = [job.job_id for jobs in started.values() for job in jobs.values() if job.cluster == "slurm"]
    in_slurm = slurm.jobs([*ids, *later.values()], record.other_owner(folder))
    runs = {run: state.states_of(run, jobs, in_slurm) for run, jobs in started.items()}
    known = {name: in_slurm[job_id] for name, job_id in later.items() if job_id in in_slurm}
    return SweepState(runs, known, lock.holder(folder) is not None)


def cancel(folder: Path, name: str | None = None) -> int:
    """End all pending and running jobs of a sweep, or only those called `name`. Returns their number.

    Raises RunError as `requests.cancel` does, also if no job has this name.
    """
    waiting = 0
    if name is None:
        _end_launch(folder)
    elif _may_change_launch(folder):
        waiting = _keep_from_starting(folder, name)
    count = waiting + _cancel_later(look(folder), folder, name)
    found = look(folder)
    for run, jobs in found.runs.items():
        live = {job.name for job in jobs if job.state in slurm.LIVE_STATES or job.is_silent}
        if name is None or name in live:
            count += len(requests.cancel(run, name))
    if name is not None and not count:
        raise RunError(Problem("JOB", name, "is not pending or running in any run of the sweep"))
    return count


def stop(folder: Path) -> tuple[int, int]:
    """Ask every training that runs to save and end, and cancel what has not begun. Returns how many of each.

    Raises RunError if nothing is pending or running.
    """
    found, is_here = look(folder), lock.holder(folder) is not None
    running = _training(found)
    if is_here:
        _end_launch(folder)  # as Ctrl-C: the run that trains saves, and no other one starts
        return len(running), 0
    cancelled = _cancel_later(found, folder, None)
    for run, jobs in found.runs.items():
        others = [job for job in jobs if job.state in slurm.LIVE_STATES]
        if run not in running and others:
            cancelled += len(requests.cancel(run))
    for run in running:
        requests.stop(run)
    if not running and not cancelled:
        raise RunError(Problem("SWEEP", folder, "has no pending or running job"))
    return len(running), cancelled


def save(folder: Path) -> int:
    """Ask every training that runs to save and go on. Returns their number. Raises RunError if none runs."""
    running = _training(look(folder))
    if not running:
        raise RunError(
            Problem("SWEEP", folder, f"has no training that runs. See muster status {shlex.quote(str(folder))}")
        )
    for run in running:
        requests.save(run)
    return len(running)


def require_best(folder: Path) -> Path:
    """Return the best run of a sweep. Raises RunError if none was trained to the end."""
    found = sweep_record.best(folder)
    if found is None:
        message = f"has no run that was trained to the end. Name a run: muster ls {shlex.quote(str(folder))}"
        raise RunError(Problem("SWEEP", folder, message))
    return found


def _training(found: SweepState) -> list[Path]:
    """Return the runs whose training runs."""
    return [
        run
        for run, jobs in found.runs.items()
        if any(job.name in RESUMABLE and job.state == "RUNNING" and job.verdict is None for job in jobs)
    ]


def _cancel_later(found: SweepState, folder: Path, name: str | None) -> int:
    """Cancel the jobs that wait for the end of all trainings, or the one called `name`. Returns their number."""
    live = {key: job for key, job in found.later.items() if job.state in slurm.LIVE_STATES and name in (None, key)}
    own = [job.job_id for job in live.values() if job.folder in ("", str(folder))]
    if own:  # first, so that none starts when the trainings have ended
        slurm.cancel(own)
    return len(own)


def _keep_from_starting(folder: Path, name: str) -> int:
    """Keep the launch that runs the sweep on this machine from starting jobs called `name`. Returns how many it had left."""
    cancelled, waiting, is_of_best = sweep_record.cancelled(folder), 0, False
    for run in sweep_record.runs(folder):
        names, lines = overview.configured_jobs(run)
        waiting += name in names and attempts.newest_attempt(run / "jobs" / name) is None
        is_of_best = is_of_best or (name in AFTER_TRAINING and overview.MERGES_BEST in lines)
    if not waiting or name in cancelled:
        return 0
    sweep_record.set_cancelled(folder, cancelled | {name})
    return 1 if is_of_best else waiting


def _end_launch(folder: Path) -> None:
    """End the process that runs the sweep on this machine, which would start the next run. Raises RunError if it may not."""
    if _may_change_launch(folder) and (holder := lock.holder(folder)):
        with suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGTERM)


def _may_change_launch(folder: Path) -> bool:
    """Return whether a process runs the sweep on this machine. Raises RunError if this user may not change what it does."""
    holder = lock.holder(folder)
    if holder is None:
        return False
    if state.is_elsewhere(holder):
        raise RunError(Problem("SWEEP", folder, f"is used by {holder}. Type this there"))
    if os.getuid() not in (0, folder.stat().st_uid) and holder.user != record.user_name(os.getuid()):
        raise RunError(Problem("SWEEP", folder, f"is used by {holder}: only {holder.user} can cancel it"))
    if not lock.is_held_by(folder, holder.pid):
        message = f"has a record of {holder}, which is another process now. If no launch runs it, delete {folder / lock.RECORD}"
        raise RunError(Problem("SWEEP", folder, message))
    return True
