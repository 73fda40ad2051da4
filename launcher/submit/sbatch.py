"""Submits one job: script and pickle are submitit's, the call of sbatch is our own, which neither loses nor doubles a job."""

import re
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import JobPaths

from launcher import slurm
from launcher.slurm_command import BusyError, SlurmError, run_once, wait_after

SBATCH_TIMEOUT_S = 120.0
"""A site's checks at submission may take a minute."""
SETTLE_S = 5.0
"""How long a controller that answers again may still take to queue what it received before it stalled."""


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
        job_id = submit(script, self.is_ours)
        job = self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))
        job.paths.move_temporary_file(script, "submission_file")
        return job


def submit(script: Path, is_ours: Callable[[slurm.SlurmJob], bool]) -> str:
    """Give a batch script to sbatch, and return the id of its job. Raises SlurmError if Slurm refuses it.

    After an error that leaves open whether the job is queued, looks for it and takes it. The script is given to sbatch again
    only when the job is certainly not queued, so there is never a second one. `is_ours` recognizes the job where a site's
    sbatch submits a copy of the script.
    """
    tries, is_open = 0, False
    while True:
        began = time.monotonic()
        try:
            output = run_once(("sbatch", str(script)), SBATCH_TIMEOUT_S)
            break
        except BusyError as error:
            is_open = is_open or error.delivered
            try:
                if is_open and (found := _jobs_of_script(script, is_ours)):
                    return found[0].job_id
                wait_after(error, tries, time.monotonic() - began)
            except BusyError as last:
                hint = (
                    ". It may be queued for all that: look with squeue --me, and end it with scancel" if is_open else ""
                )
                raise BusyError(f"{last}{hint}") from None
            tries += 1
    print(output.stderr, end="", file=sys.stderr, flush=True)  # notices of the site
    job_id = submitted_id(output.stdout)
    if job_id is not None and not is_open:
        return job_id
    found = _jobs_of_script(script, is_ours)
    if job_id is None and not found:
        raise SlurmError(f"sbatch printed no job id: {' | '.join(output.stdout.split(chr(10)))}")
    job_id = job_id or found[0].job_id
    if others := [job.job_id for job in found if job.job_id != job_id and job.state in slurm.LIVE_STATES]:
        slurm.cancel(others)
    return job_id


def submitted_id(printed: str) -> str | None:
    """Return the job id in what sbatch printed. A site's sbatch may print more lines, before and after it."""
    for pattern in (r"^Submitted batch job (\d+)\b", r"^(\d+)(?:;\S+)?\s*$"):  # the second: with --parsable
        if found := re.findall(pattern, printed, re.MULTILINE):
            return str(found[-1])
    return None


def _jobs_of_script(script: Path, is_ours: Callable[[slurm.SlurmJob], bool]) -> list[slurm.SlurmJob]:
    """Return the jobs of a script, oldest first. Asks twice, so that the controller has time to queue what it had received.

    An array counts as one job, with the id that sbatch gives to it.
    """
    found: dict[str, slurm.SlurmJob] = {}
    for pause_s in (0.0, SETTLE_S):
        time.sleep(pause_s)
        for job in slurm.own_jobs():
            if job.script == str(script) or is_ours(job):
                job_id = job.job_id.partition("_")[0]
                found[job_id] = replace(job, job_id=job_id)
        if found:
            break
    return [found[job_id] for job_id in sorted(found, key=int)]
