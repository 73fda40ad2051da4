"""Tells whether a Slurm job id is still that of a job of this run: Slurm gives ids again, and clusters may share a home."""

import os
from pathlib import Path

from launcher.run_folder.record import StartedJob
from launcher.slurm import SlurmJob


def is_of_run(job: SlurmJob, run: Path, started: StartedJob) -> bool:
    """Return whether the job that Slurm knows by an id is the one that the run started: it has the same name and folder.

    What a command did not say (an old Slurm, a database without folders) does not count against the job.
    """
    if job.name and started.slurm_name and job.name != started.slurm_name:
        return False
    return not job.folder or _same(job.folder, run / started.folder)


def describe(job: SlurmJob) -> str:
    """Return one line about a job that is not of the run."""
    return f"its id {job.job_id} now belongs to another job: {job.name} of {job.user} in {job.folder}"


def _same(one: str, other: Path) -> bool:
    """Return whether two paths are one folder, also through symbolic links; by their names if they are gone."""
    try:
        return other.samefile(one)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
