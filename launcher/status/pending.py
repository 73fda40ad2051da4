"""Asks Slurm why the pending jobs of a run wait, and says it in plain words."""

from collections.abc import Iterable, Mapping
from contextlib import suppress

from conf.jobs import JOB_KINDS
from launcher import slurm
from launcher.status.pending_reasons import Waiting, explained
from launcher.status.state import JobState


def reasons(jobs: Iterable[JobState]) -> dict[str, str]:
    """Return why each pending job waits, by the names of the jobs. Without an answer of Slurm, a job is left out."""
    listed = list(jobs)
    parents = {job.job_id: job.name for job in listed}
    found = {}
    for job in listed:
        if job.state == "PENDING":
            try:
                found[job.name] = _reason(job, parents)
            except slurm.SlurmError:
                continue
    return found


def _reason(job: JobState, parents: Mapping[str, str]) -> str:
    reason, start = slurm.pending_reason(job.job_id)
    fields: dict[str, str] = {}
    limit = None
    with suppress(slurm.SlurmError):  # the reason alone says much
        fields = slurm.show_job(job.job_id)
        limit = slurm.partition_limit(fields.get("Partition", "")) if reason == "PartitionTimeLimit" else None
    section = f"cluster.{JOB_KINDS[job.name].section}"
    expected = None if start == "N/A" else start
    return explained(Waiting(job.job_id, reason, section, expected, fields, limit, parents))
