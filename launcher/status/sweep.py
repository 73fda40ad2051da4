"""Looks at the runs of a sweep together, and ends them together. `folder` is always the folder of the sweep."""

from dataclasses import dataclass
from pathlib import Path

from launcher import slurm
from launcher.run_folder import lock, record, sweep_record
from launcher.status import state


@dataclass(frozen=True)
class SweepState:
    """What the jobs of a sweep are doing."""

    runs: dict[Path, list[state.JobState]]
    """The jobs of each run that has been started."""
    later: dict[str, slurm.SlurmJob]
    """The Slurm jobs that wait for the end of all trainings, by name."""

    @property
    def is_live(self) -> bool:
        """Whether a job is pending or running, or a launch is running them on this machine."""
        states = [job.state for jobs in self.runs.values() for job in jobs] + [job.state for job in self.later.values()]
        return any(item in slurm.LIVE_STATES for item in states) or any(lock.holder(run) for run in self.runs)

    @property
    def notes(self) -> list[str]:
        """Why Slurm gave no answer."""
        return [job.note for jobs in self.runs.values() for job in jobs if "does not answer" in job.note]

    @property
    def failed(self) -> list[Path]:
        """The runs of which a job has failed."""
        return [run for run, jobs in self.runs.items() if any(job.failed for job in jobs)]


def look(folder: Path) -> SweepState:
    """Return the state of all jobs of a sweep. Slurm is asked once."""
    started = {run: record.newest_jobs(run) for run in sweep_record.runs(folder) if (run / "run.json").is_file()}
    later = sweep_record.jobs(folder)
    ids = [job.job_id for jobs in started.values() for job in jobs.values() if job.cluster == "slurm"]
    in_slurm = slurm.jobs([*ids, *later.values()], record.other_owner(folder))
    runs = {run: state.states_of(run, jobs, in_slurm) for run, jobs in started.items()}
    return SweepState(runs, {name: in_slurm[job_id] for name, job_id in later.items() if job_id in in_slurm})


def cancel(folder: Path) -> int:
    """End all pending and running jobs of a sweep. Returns their number. Raises RunError as `state.cancel` does."""
    later = [job for job in look(folder).later.values() if job.state in slurm.LIVE_STATES]
    own = [job.job_id for job in later if job.folder in ("", str(folder))]
    if own:  # first, so that none starts when the trainings have ended
        slurm.cancel(own)
    runs = (run for run in sweep_record.runs(folder) if (run / "run.json").is_file())
    return len(own) + sum(len(state.cancel(run)) for run in runs)
