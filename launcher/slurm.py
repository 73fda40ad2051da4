"""Runs Slurm's commands and parses their output; no other module of the launcher calls Slurm.

Standard library only: this file also runs on the compute node, outside the container, before any environment is set up.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import pwd
import re
import subprocess
from collections.abc import Iterable

LIVE_STATES = {
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
"""States of a job that has not ended yet."""


class SlurmError(Exception):
    """Raised when a Slurm command fails or is not installed. The message is the command's first error line."""


class NoSlurmError(SlurmError):
    """Raised when a Slurm command is not installed on this machine."""


def call(*words: str, timeout_s: float = 60) -> str:
    """Run a Slurm command and return what it prints. Raises SlurmError with its first error line."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise NoSlurmError(f"{words[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise SlurmError(lines[0] if lines else f"{words[0]} exited with {done.returncode}")
    return done.stdout


def hostnames(nodelist: str) -> list[str]:
    """Expand a node list: `n[1-2]` becomes n1, n2. Ranks are numbered in this order."""
    return call("scontrol", "show", "hostnames", nodelist).split()


def node_address(node: str) -> str | None:
    """Return the address that the controller uses for a node (NodeAddr), for clusters whose node names do not resolve."""
    match = re.search(r"NodeAddr=(\S+)", call("scontrol", "show", "node", node))
    return match.group(1) if match else None


def states(job_ids: Iterable[str], strict: bool = False) -> dict[str, str]:
    """Return the state of each job by id. Jobs that Slurm no longer knows are left out.

    Asks squeue for live jobs, then sacct for ended ones. Without accounting, scontrol still remembers an ended job for
    MinJobAge (5 min).

    With `strict`, raises SlurmError when squeue is installed but fails: a live job must not be taken for an ended one.
    """
    wanted = list(job_ids)
    known: dict[str, str] = {}
    for command in (_squeue, _sacct, _scontrol):
        unknown = [job_id for job_id in wanted if job_id not in known]
        if unknown:
            try:
                known |= command(unknown)
            except NoSlurmError:
                continue
            except SlurmError:
                if strict and command is _squeue:
                    raise
    return known


def show_job(job_id: str) -> dict[str, str]:
    """Return the controller's fields of a job, e.g. JobState, Reason, Restarts and ExcNodeList."""
    return dict(re.findall(r"(\w+)=(\S+)", call("scontrol", "--oneliner", "show", "job", job_id)))


def seconds_left(job_id: str) -> float | None:
    """Return the seconds until the job's time limit; None for a job without a limit.

    Asks for the time left, not for the end date: clocks and date formats differ between machines.
    """
    text = call("squeue", "--noheader", "--jobs", job_id, "--format", "%L").strip()
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)  # [[days-]hours:]minutes:seconds
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def requeue(job_id: str) -> None:
    """Put a job back into the queue. Slurm ends its batch script at once."""
    call("scontrol", "requeue", job_id)


def exclude(job_id: str, nodes: Iterable[str]) -> None:
    """Set the nodes that a pending job must not get. Replaces the nodes excluded before."""
    call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(nodes)}")


def cancelled_by(job_id: str) -> str:
    """Return the name of the user who cancelled a job, as accounting knows it; empty if nobody has cancelled it."""
    words = ("--noheader", "--allocations", "--allusers", "--parsable2", "--format=State", "--jobs", job_id)
    match = re.search(r"CANCELLED by (\d+)", call("sacct", *words))
    if match is None:
        return ""
    try:
        return pwd.getpwuid(int(match.group(1))).pw_name
    except KeyError:
        return match.group(1)


def pending_reason(job_id: str) -> tuple[str, str]:
    """Return why a job is pending, and when Slurm expects to start it (`N/A` if Slurm does not know)."""
    out = call("squeue", "--noheader", "--jobs", job_id, "--format", "%r|%S").strip()
    reason, _, start = out.partition("|")
    return reason or "none", start or "N/A"


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs with one call of scancel."""
    call("scancel", *job_ids)


def _squeue(job_ids: list[str]) -> dict[str, str]:
    # On old versions one unknown id makes a whole --jobs list fail, so list all jobs of the user and pick ours.
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
    return {job_id: state.split()[0] for job_id, state in rows if job_id in job_ids}  # "CANCELLED by 1000"


def _scontrol(job_ids: list[str]) -> dict[str, str]:
    known = {}
    for job_id in job_ids:
        try:
            match = re.search(r"JobState=(\S+)", call("scontrol", "show", "job", job_id))
        except SlurmError:
            continue
        if match:
            known[job_id] = match.group(1)
    return known
