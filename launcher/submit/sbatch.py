"""Submits one job through submitit: its script and its pickle, but with our own call of sbatch, which never loses a job."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import JobPaths

from launcher import slurm


class Executor(SlurmExecutor):  # type: ignore[misc] # submitit has no annotations for mypy
    """submitit's executor. `is_ours` recognizes the job in Slurm's list after an error that leaves open whether it is queued.

    Its own call of sbatch takes such an error for a refusal, reads a site's banner for the id, and passes on the variables
    of a job in which launch.py may run.
    """

    def __init__(self, folder: Path, python: str, is_ours: Callable[[slurm.SlurmJob], bool]) -> None:
        super().__init__(folder, python=python)
        self.is_ours = is_ours

    def _submit_command(self, command: str) -> Any:
        # Private, but what SlurmExecutor.submit calls; tests/launcher/submit/test_submit.py compares what sbatch gets.
        folder, token = JobPaths.get_first_id_independent_folder(self.folder), uuid.uuid4().hex
        script: Path = folder / f".submission_file_{token}.sh"
        script.write_text(self._make_submission_file_text(command, token), encoding="utf-8")
        job_id = slurm.submit(script, self.is_ours)
        job = self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))
        job.paths.move_temporary_file(script, "submission_file")
        return job
