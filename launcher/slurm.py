"""Runs Slurm's commands, and reads what they print; the only module that does. Standard library only: it also runs on the
compute node, outside the container, before any environment is set up."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import re
import subprocess
from collections.abc import Iterable

LIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "STOPPED",
}


class SlurmError(Exception):
    """Raised when a Slurm command fails or is not there; the message is its own first line."""


class NoSlurmError(SlurmError):
    """Raised when a Slurm command is not installed here."""


def call(*words: str, timeout_s: float = 60) -> str:
    """What a Slurm command prints. Raises SlurmError with its first error line."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise NoSlurmError(f"{words[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} gave no answer in {timeout_s:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise SlurmError(lines[0] if lines else f"{words[0]} exited with {done.returncode}")
    return done.stdout


def hostnames(nodelist: str) -> list[str]:
    """`n[1-2]` as n1, n2: the order is that of the ranks."""
    return call("scontrol", "show", "hostnames", nodelist).split()


def node_address(node: str) -> str | None:
    """The address the controller uses for a node (NodeAddr), for clusters whose node names do not resolve."""
    found = re.search(r"NodeAddr=(\S+)", call("scontrol", "show", "node", node))
    return found.group(1) if found else None


def states(job_ids: Iterable[str], strict: bool = False) -> dict[str, str]:
    """State of each job by id. squeue knows the live ones, then sacct; without accounting scontrol remembers for
    MinJobAge (5 min). A job that none of them knows is absent.

    With `strict`, raises SlurmError when there is a squeue and it gives no answer: a live job must not be taken for an ended one.
    """
    wanted = list(job_ids)
    found: dict[str, str] = {}
    for command in (_squeue, _sacct, _scontrol):
        rest = [item for item in wanted if item not in found]
        if rest:
            try:
                found |= command(rest)
            except NoSlurmError:
                continue
            except SlurmError:
                if strict and command is _squeue:
                    raise
    return found


def job(job_id: str) -> dict[str, str]:
    """What the controller holds of a job, such as JobState, Reason, Restarts and ExcNodeList."""
    return dict(re.findall(r"(\w+)=(\S+)", call("scontrol", "--oneliner", "show", "job", job_id)))


def seconds_left(job_id: str) -> float | None:
    """Until the job's time limit; None where it has none. Asked for as a span, because clocks and formats of dates differ."""
    text = call("squeue", "--noheader", "--jobs", job_id, "--format", "%L").strip()
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def requeue(job_id: str) -> None:
    """Put a job back into the queue. Slurm ends its batch script at once."""
    call("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Iterable[str]) -> None:
    """Keep a waiting job from nodes; these replace those it was kept from before."""
    call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def pending_reason(job_id: str) -> tuple[str, str]:
    """Why a job waits, and when Slurm thinks it will start (`N/A` where it does not know)."""
    out = call("squeue", "--noheader", "--jobs", job_id, "--format", "%r|%S").strip()
    reason, _, start = out.partition("|")
    return reason or "none", start or "N/A"


def cancel(job_ids: Iterable[str]) -> None:
    call("scancel", *job_ids)


def _squeue(job_ids: list[str]) -> dict[str, str]:
    # one unknown id fails a whole --jobs list on old versions, so ask for all of the user's and pick
    rows = (
        line.split("|")
        for line in call("squeue", "--noheader", "--me", "--states=all", "--format", "%i|%T").splitlines()
    )
    return {row[0]: row[1] for row in rows if row[0] in job_ids}


def _sacct(job_ids: list[str]) -> dict[str, str]:
    out = call(
        "sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", "--jobs", ",".join(job_ids)
    )
    rows = (line.split("|") for line in out.splitlines() if "|" in line)
    return {job_id: state.split()[0] for job_id, state in rows if job_id in job_ids}


def _scontrol(job_ids: list[str]) -> dict[str, str]:
    found = {}
    for job_id in job_ids:
        try:
            state = re.search(r"JobState=(\S+)", call("scontrol", "show", "job", job_id))
        except SlurmError:
            continue
        if state:
            found[job_id] = state.group(1)
    return found
