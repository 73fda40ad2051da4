"""Decides from a job's verdicts whether Slurm should start it again, and requeues it: the last act of the batch script."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import math
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

from conf.files import write_json
from conf.jobs import RESUMABLE
from launcher import slurm
from launcher.run_folder import attempts
from launcher.run_folder.status import (
    BAD_NODE,
    COMPLETED,
    FAILED,
    NO_PROGRESS,
    OUT_OF_MEMORY,
    PLANNED,
    PREEMPTED,
    STOPPED,
    TIME_LIMIT,
    USER_ERROR,
)

RESUME = "to continue: muster resume RUN"
WAIT_S = 120.0
"""How long a job that does not start again waits for a Slurm that is busy."""
BY_SLURM = "Slurm itself has requeued the job"


class SlurmView(Enum):
    """How Slurm sees the job that this batch script belongs to."""

    OURS = "running"
    """It runs this start of the job."""
    REQUEUED = "already requeued"
    """Slurm has requeued it by itself."""
    TIME_LIMIT = "past its time limit"
    ORPHANED = "its batch script was killed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Decision:
    """Whether the job starts again."""

    again: bool
    why: str
    """The reason, as `muster status` shows it."""
    status: str
    """The final status of the verdict."""


def decide_and_requeue(
    folder: Path, verdict: dict[str, Any], max_restarts: int | None, restarts: int
) -> dict[str, Any]:
    """Decide whether a Slurm job starts again after `verdict`, write that into the verdict, and requeue the job if so.

    `folder` is the job's folder, `restarts` is Slurm's restart count of this start (SLURM_RESTART_COUNT), and
    `max_restarts` is None if nothing may be requeued. Returns the changed verdict. After the requeue, Slurm ends the
    batch script.

    While Slurm is busy, waits for as long as the job lives if it should start again: the work is saved, and without the
    requeue the run would end.
    """
    # Only attempts of this submission: a resume by hand starts the count of restarts anew.
    earlier = [
        item
        for item in attempts.verdicts(folder)
        if item["attempt"] < verdict["attempt"] and str(item.get("job_id")) == str(verdict["job_id"])
    ]
    may_restart = decide([*earlier, verdict], max_restarts, saves=folder.name in RESUMABLE).again
    with slurm.retrying(math.inf if may_restart else WAIT_S):
        return _decide_with_slurm(folder, verdict, earlier, max_restarts, restarts)


def _decide_with_slurm(
    folder: Path, verdict: dict[str, Any], earlier: list[dict[str, Any]], max_restarts: int | None, restarts: int
) -> dict[str, Any]:
    path, job_id = folder / f"attempt-{verdict['attempt']}.json", str(verdict["job_id"])
    view: SlurmView | None = None
    problem = ""
    try:
        view = view_of_job(job_id, restarts)
    except slurm.SlurmError as error:
        problem = f"Slurm does not give the job's state: {error}"
    _correct_status(verdict, view)
    decision = decide([*earlier, verdict], max_restarts, saves=folder.name in RESUMABLE)
    why = decision.why.replace(" (train.save_every)", "") if folder.name == "custom" else decision.why
    verdict |= {"status": decision.status, "requeued": decision.again, "next": why}
    if view is SlurmView.REQUEUED:
        verdict |= {"requeued": True, "next": BY_SLURM}
    elif decision.again and view in (None, SlurmView.CANCELLED):  # scontrol would requeue even a cancelled job
        verdict |= {"requeued": False, "next": f"cannot be requeued ({problem or 'cancelled'}); {RESUME}"}
    write_json(path, verdict)  # before the requeue, because Slurm may leave no time afterwards
    if verdict["requeued"] and view is not SlurmView.REQUEUED:
        try:
            verdict["next"] += requeue_job(job_id, verdict, restarts)
        except slurm.SlurmError as error:
            verdict |= {"requeued": False, "next": f"Slurm refused to requeue the job ({error}); {RESUME}"}
        write_json(path, verdict)
    return verdict


def _correct_status(verdict: dict[str, Any], view: SlurmView | None) -> None:
    """Correct the verdict with what only Slurm knows: the ranks see just a SIGTERM, or nothing before a SIGKILL."""
    if verdict["status"] not in PLANNED and (verdict["status"] != FAILED or verdict.get("error")):
        return  # a rank recorded what went wrong
    if view is SlurmView.CANCELLED:
        verdict |= {"status": STOPPED, "reason": f"cancelled: {verdict['reason']}"}
    elif view is SlurmView.TIME_LIMIT:
        verdict |= {"status": TIME_LIMIT, "reason": f"past its time limit: {verdict['reason']}"}
    elif view is SlurmView.ORPHANED:
        verdict |= {"reason": f"its batch script was killed: {verdict['reason']}"}


def decide(verdicts: list[dict[str, Any]], max_restarts: int | None, *, saves: bool) -> Decision:
    """Decide whether a job starts again after the last of `verdicts`, which are those of one submission, in order.

    Planned stops may follow each other without limit while checkpoints advance. After a failure, the job starts again
    `max_restarts` times since the last new checkpoint; never if `max_restarts` is None.
    `saves`: the job writes checkpoints (training), so a job that was stopped continues where it was.
    """
    last = verdicts[-1]
    status = last["status"]
    if status == COMPLETED:
        return Decision(False, "", status)
    final_reason = _reason_never_to_restart(last, max_restarts, saves)
    if final_reason or max_restarts is None:
        return Decision(False, final_reason, status)
    if saves and status in (PREEMPTED, TIME_LIMIT):
        if why := _reason_of_no_progress(verdicts, max_restarts):
            return Decision(False, f"{why}; {RESUME}", NO_PROGRESS)
        return Decision(True, "continues from its checkpoint", status)
    # A broken GPU would hardly give NaN at the same step twice, so another start on other hardware would not help.
    if len(verdicts) > 1 and _same_nan(*verdicts[-2:]):
        why = "the loss was NaN or infinite at the same step twice, so look at the data or the settings, not at the hardware"
        return Decision(False, f"{why}; once that is fixed, {RESUME}", status)
    last_progress = max((number for number, item in enumerate(verdicts) if made_progress(item)), default=0)
    used = len(verdicts) - 1 - last_progress
    if used >= max_restarts:
        why = f"{used} restarts without a new checkpoint (cluster.max_restarts={max_restarts})"
        return Decision(False, f"{why}; once the cause is fixed, {RESUME}", status)
    return Decision(True, f"restart {used + 1} of {max_restarts} since the last new checkpoint", status)


def _reason_of_no_progress(verdicts: list[dict[str, Any]], max_restarts: int) -> str:
    """Return why a job that was stopped as planned would not get further; empty if it may.

    One that was preempted before its first step says nothing about its settings: it may start again as often as after a failure.
    """
    fruitless = list(takewhile(lambda item: item["status"] in PLANNED and not made_progress(item), reversed(verdicts)))
    at_start = [item for item in fruitless if item["status"] == PREEMPTED and not _has_trained(item)]
    if len(fruitless) - len(at_start) > 1:
        status = verdicts[-1]["status"]
        return f"two attempts without a new checkpoint ({status}): give it more time, or save more often (train.save_every)"
    if len(at_start) > max(1, max_restarts):
        return f"preempted {len(at_start)} times in a row before its first step (cluster.max_restarts={max_restarts})"
    return ""


def _has_trained(verdict: dict[str, Any]) -> bool:
    """Return whether an attempt has done a step."""
    return (verdict.get("step") or 0) > (verdict.get("resumed") or 0)


def made_progress(verdict: dict[str, Any]) -> bool:
    """Return whether an attempt left a newer checkpoint than it started from."""
    return (verdict.get("saved") or 0) > (verdict.get("resumed") or 0)


def _same_nan(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether both attempts ended with a NaN or infinite loss at the same step."""
    return one["step"] == other["step"] and all("FloatingPointError" in item["reason"] for item in (one, other))


def _reason_never_to_restart(last: dict[str, Any], max_restarts: int | None, saves: bool) -> str:
    """Return why a job that ended like this must not start again, whatever came before; empty if it may."""
    status = last["status"]
    if status == STOPPED:
        return f"stopped on request; {RESUME}"
    if status == USER_ERROR:
        return f"it would fail again; once the cause is fixed, {RESUME}"
    if max_restarts is None:
        return f"cluster.requeue=false; {RESUME}"
    if status == TIME_LIMIT and not saves:
        return "it would start from the beginning and reach the limit again: raise time_min"
    if status == OUT_OF_MEMORY and not _has_trained(last):
        return "it would fail again: it ran out of memory before its first step was done"
    return ""


def view_of_job(job_id: str, restarts: int) -> SlurmView:
    """Ask Slurm how it sees the job whose restart count was `restarts` when this script started. Raises SlurmError."""
    job = slurm.show_job(job_id)
    if int(job.get("Restarts", restarts)) > restarts:
        return SlurmView.REQUEUED
    if job.get("JobState") == "RUNNING":
        return SlurmView.OURS
    by_reason = {"TimeLimit": SlurmView.TIME_LIMIT, "JobLaunchFailure": SlurmView.ORPHANED}
    return by_reason.get(job.get("Reason", ""), SlurmView.CANCELLED)


def requeue_job(job_id: str, verdict: dict[str, Any], restarts: int) -> str:
    """Requeue the job, and exclude the node if it is bad. Returns what to add to the verdict's `next`.

    Slurm sends SIGTERM to the batch script at once, and SIGKILL after KillWait, so this must be the script's last act.
    The exclusion comes second, because Slurm changes the nodes of a pending job only. Raises SlurmError.
    """
    job = slurm.show_job(job_id)
    if slurm.requeues_by_itself(job):
        return "; Slurm requeues the job that it preempts"
    excluded = job.get("ExcNodeList", "(null)")
    try:
        slurm.requeue(job_id)
    except slurm.SlurmError:  # an earlier try, which got no answer, may have requeued it
        if view_of_job(job_id, restarts) is not SlurmView.REQUEUED:
            raise
    if verdict["status"] != BAD_NODE:
        return ""
    node = str(verdict["host"])
    try:
        slurm.exclude(job_id, [node] if excluded == "(null)" else [excluded, node])
    except slurm.SlurmError as error:
        return f", but {node} could not be excluded ({error})"
    return f", without {node}"
