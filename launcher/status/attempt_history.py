"""Sorts the attempts of a job: those of its newest start, and those of earlier submissions."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.run_folder import attempts


@dataclass(frozen=True)
class AttemptHistory:
    """The attempts of one start (submission) of a job."""

    number: int | None = None
    """Of the newest attempt; None before the first."""
    verdict: dict[str, Any] | None = None
    """Of the newest attempt; None while it runs."""
    before: list[dict[str, Any]] = field(default_factory=list)
    """Verdicts of the earlier attempts, oldest first."""
    began: float | None = None
    """When the newest attempt began, in seconds since 1970."""
    job_id: str = ""
    """Of the newest attempt."""


def of_all_starts(folder: Path, number: int | None, found: list[dict[str, Any]]) -> AttemptHistory:
    """Return the attempts of all starts of a job. On this machine every start is one attempt."""
    verdicts = {verdict["attempt"]: verdict for verdict in found}
    if number is None:
        return AttemptHistory(before=found)
    newest = verdicts.pop(number, None)
    record = newest if newest and "job_id" in newest else attempts.begin_record(folder, number)
    began = attempts.number((newest or record).get("started"))
    return AttemptHistory(number, newest, list(verdicts.values()), began, str(record.get("job_id")))


def of_slurm_job(history: AttemptHistory, job_id: str) -> AttemptHistory:
    """Return the attempts that one Slurm job has made, without those of earlier submissions."""
    before = [verdict for verdict in history.before if str(verdict.get("job_id")) == job_id]
    if history.job_id != job_id:  # the newest attempt is that of another submission
        return AttemptHistory(before=before)
    return replace(history, before=before)
