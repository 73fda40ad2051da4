"""Looks at the runs of a sweep together, and ends them together. `folder` is always the folder of the sweep."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conf.errors import Problem, RunError
from launcher import slurm
from launcher.run_folder import lock, record, sweep_record
from launcher.status import find, requests, state


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
    if name is None:
        _end_launch(folder)
    found = look(folder)
    later = {key: job for key, job in found.later.items() if job.state in slurm.LIVE_STATES and name in (None, key)}
    own = [job.job_id for job in later.values() if job.folder in ("", str(folder))]
    if own:  # first, so that none starts when the trainings have ended
        slurm.cancel(own)
    count = len(own)
    for run, jobs in found.runs.items():
        live = {job.name for job in jobs if job.state in slurm.LIVE_STATES | {"UNKNOWN"}}
        if name is None or name in live:
            count += len(requests.cancel(run, name))
    if name is not None and not count:
        raise RunError(Problem("JOB", name, "is not pending or running in any run of the sweep"))
    return count


def _end_launch(folder: Path) -> None:
    """End the process that runs the sweep on this machine, which would start the next run. Raises RunError if it may not."""
    holder = lock.holder(folder)
    if holder is None:
        return
    if state.is_elsewhere(holder):
        raise RunError(Problem("SWEEP", folder, f"is used by {holder}. Type this there"))
    if os.getuid() not in (0, folder.stat().st_uid) and holder.user != record.user_name(os.getuid()):
        raise RunError(Problem("SWEEP", folder, f"is used by {holder}: only {holder.user} can cancel it"))
    if not lock.is_held_by(folder, holder.pid):
        message = f"has a record of {holder}, which is another process now. If no launch runs it, delete {folder / lock.RECORD}"
        raise RunError(Problem("SWEEP", folder, message))
    with suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
