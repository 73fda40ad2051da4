"""Decides from a job's verdicts whether Slurm shall start it again, and asks Slurm to: the batch script's last act."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.files import write_json
from conf.jobs import RESUMABLE
from launcher import slurm
from launcher.run_folder import attempts as history
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

RESUME = "go on with python launch.py resume=RUN"
WAIT_S, PAUSE_S = 600.0, 5.0
ORPHANED = "orphaned"
BY_SLURM = "Slurm itself has put the job back into the queue"


@dataclass(frozen=True)
class Decision:
    """Whether the job starts again, and why, in words for `status`; `status` is what the verdict becomes."""

    again: bool
    why: str
    status: str


def settle(folder: Path, verdict: dict[str, Any], max_restarts: int | None, restarts: int) -> dict[str, Any]:
    """Decide what becomes of a Slurm job, on its start number `restarts`, after this verdict; write that into the verdict,
    and put the job back into the queue where it shall go on. Slurm then ends the batch script.
    """
    path, job_id = folder / f"attempt-{verdict['attempt']}.json", str(verdict["job_id"])
    try:
        found = patiently(lambda: standing(job_id, restarts))
    except slurm.SlurmError as error:
        found = f"Slurm does not say how the job stands: {error}"
    _as_slurm_has_it(verdict, found)
    before = [item for item in history.verdicts(folder) if item["attempt"] < verdict["attempt"]]
    same = [item for item in before if str(item.get("job_id")) == job_id]
    decision = decide([*same, verdict], max_restarts, folder.name in RESUMABLE)
    verdict |= {"status": decision.status, "requeued": decision.again, "next": decision.why}
    if found == "requeued":
        verdict |= {"requeued": True, "next": BY_SLURM}
    elif decision.again and found not in ("ours", TIME_LIMIT, ORPHANED):
        verdict |= {"requeued": False, "next": f"cannot be requeued ({found}); {RESUME}"}
    write_json(path, verdict)  # before Slurm is asked: there may be no time afterwards
    if verdict["requeued"] and found != "requeued":
        try:
            verdict["next"] += patiently(lambda: again(job_id, verdict))
        except slurm.SlurmError as error:
            verdict |= {"requeued": False, "next": f"Slurm refused to requeue it ({error}); {RESUME}"}
        write_json(path, verdict)
    return verdict


def _as_slurm_has_it(verdict: dict[str, Any], found: str) -> None:
    """The ranks cannot tell why they got SIGTERM, or nothing before SIGKILL; Slurm can."""
    if verdict["status"] not in PLANNED and (verdict["status"] != FAILED or verdict.get("error")):
        return  # a rank said what went wrong
    if found == "cancelled":
        verdict |= {"status": STOPPED, "reason": f"cancelled: {verdict['reason']}"}
    elif found == TIME_LIMIT:
        verdict |= {"status": TIME_LIMIT, "reason": f"past its time limit: {verdict['reason']}"}
    elif found == ORPHANED:
        verdict |= {"reason": f"its batch script was killed: {verdict['reason']}"}


def decide(attempts: list[dict[str, Any]], max_restarts: int | None, saves: bool) -> Decision:
    """What becomes of a job after the last verdict of `attempts`, those of its attempts from its submission on, in order.

    Stops that were asked for go on without limit while checkpoints advance. Failures go on `max_restarts` times since the
    last new checkpoint; null never. `saves`: the job writes checkpoints (training), so that a stopped one gets further.
    """
    last = attempts[-1]
    status = last["status"]
    if status == COMPLETED:
        return Decision(False, "", status)
    never = _never(last, max_restarts, saves)
    if never or max_restarts is None:
        return Decision(False, never, status)
    if saves and status in (PREEMPTED, TIME_LIMIT):
        if len(attempts) > 1 and all(item["status"] in PLANNED and not advanced(item) for item in attempts[-2:]):
            why = f"two attempts without a new checkpoint ({status}): give it more time, or save more often (train.save_every)"
            return Decision(False, f"{why}; {RESUME}", NO_PROGRESS)
        return Decision(True, "goes on from its checkpoint", status)
    if len(attempts) > 1 and _same_numbers(*attempts[-2:]):
        why = "the loss was no number at the same step again, so no device is at fault"
        return Decision(False, f"{why}: mend it, then {RESUME}", status)
    used = len(attempts) - 1 - max((number for number, item in enumerate(attempts) if advanced(item)), default=0)
    if used >= max_restarts:
        why = f"{used} restarts without a new checkpoint (cluster.max_restarts={max_restarts})"
        return Decision(False, f"{why}; once it is mended {RESUME}", status)
    return Decision(True, f"restart {used + 1} of {max_restarts} since the last new checkpoint", status)


def advanced(verdict: dict[str, Any]) -> bool:
    """Whether an attempt left a newer checkpoint than it began with."""
    return (verdict.get("saved") or 0) > (verdict.get("resumed") or 0)


def _same_numbers(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both attempts ended in NaN or infinity, at the same step."""
    return one["step"] == other["step"] and all("FloatingPointError" in item["reason"] for item in (one, other))


def _never(last: dict[str, Any], max_restarts: int | None, saves: bool) -> str:
    """Why this end is for good whatever came before; empty where it is not."""
    status = last["status"]
    if status == STOPPED:
        return f"that was asked for; {RESUME}"
    if status == USER_ERROR:
        return f"it would fail again: mend it, then {RESUME}"
    if max_restarts is None:
        return f"cluster.requeue=false; {RESUME}"
    if status == TIME_LIMIT and not saves:
        return "it would begin from the start: give it a longer time_min"
    if status == OUT_OF_MEMORY and (last.get("step") or 0) <= (last.get("resumed") or 0):
        return "it would fail again: it ran out of memory before its first step was done"
    return ""


def patiently(ask: Callable[[], str]) -> str:
    """What `ask` returns, asked again for WAIT_S while the controller does not answer: it may be restarting, the work is saved."""
    until = time.monotonic() + WAIT_S
    while True:
        try:
            return ask()
        except slurm.SlurmError as error:
            if "contact" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(PAUSE_S)


def standing(job_id: str, restarts: int) -> str:
    """How Slurm sees the job that this script belongs to, on its start number `restarts`.

    `ours` (it runs), `requeued` (Slurm has put it back by itself), `time_limit`, `orphaned` (its batch script was killed)
    or `cancelled`. Raises SlurmError.
    """
    job = slurm.job(job_id)
    if int(job.get("Restarts", restarts)) > restarts:
        return "requeued"
    if job.get("JobState") == "RUNNING":
        return "ours"
    return {"TimeLimit": TIME_LIMIT, "JobLaunchFailure": ORPHANED}.get(job.get("Reason", ""), "cancelled")


def again(job_id: str, verdict: dict[str, Any]) -> str:
    """Put the job back into the queue, on other nodes where one is bad; returns what is to be said of that.

    Slurm sends SIGTERM to the batch script at once, and SIGKILL after KillWait, so nothing may be left to do.
    Excluding comes second, because only a waiting job's nodes can be changed. Raises SlurmError.
    """
    before = slurm.job(job_id).get("ExcNodeList", "(null)")
    slurm.requeue(job_id)
    if verdict["status"] != BAD_NODE:
        return ""
    node = str(verdict["host"])
    try:
        slurm.exclude(job_id, [node] if before == "(null)" else [before, node])
    except slurm.SlurmError as error:
        return f", but {node} could not be excluded ({error})"
    return f", without {node}"
