"""Asks Slurm about jobs and changes them, and parses what its commands print; no other module of the launcher calls Slurm.

Standard library only: this file also runs on the compute node, outside the container, before any environment is set up.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import os
import pwd
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from launcher import slurm_array
from launcher.slurm_command import BusyError, NoSlurmError, SlurmError, call, retrying

__all__ = ["BusyError", "NoSlurmError", "SlurmError", "call", "retrying"]

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

STARTED_AGAIN_AFTER = {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"}
"""States after which Slurm itself puts a job back into the queue, if the job allows it."""

FIELDS = "%i|%T|%u|%j|%Z"
"""squeue's format of what `_parse` reads."""

USE = (
    "JobID",
    "WorkDir",
    "ElapsedRaw",
    "AllocCPUS",
    "TotalCPU",
    "ReqMem",
    "AllocTRES",
    "TRESUsageInTot",
    "TRESUsageInAve",
)
"""Fields of sacct of what a job had and used."""


Ask = Callable[["list[str]"], "list[SlurmJob]"]
"""Asks a command of Slurm about job ids. Raises SlurmError."""


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says about a job id. Empty text: the command does not say it."""

    job_id: str
    state: str
    user: str = ""
    name: str = ""
    folder: str = ""
    """The folder in which the job starts."""
    script: str = ""
    """The path that was given to sbatch. Only `own_jobs` knows it."""
    silence: str = ""
    """Why Slurm gave no answer about the id; its state is UNKNOWN then."""


def node_address(node: str) -> str | None:
    """Return the address that the controller uses for a node (NodeAddr), for clusters whose node names do not resolve."""
    match = re.search(r"NodeAddr=(\S+)", call("scontrol", "show", "node", node))
    return match.group(1) if match else None


def jobs(job_ids: Iterable[str], user: str | None = None, strict: bool = False) -> dict[str, SlurmJob]:
    """Return what Slurm knows about each id. Ids that it no longer knows are left out.

    Slurm may give an id again (to another user too), so compare the job's folder before changing anything.
    Asks squeue for live jobs of this user and of `user`, then sacct for ended ones. Without accounting, scontrol still
    remembers an ended job for MinJobAge (5 min). If squeue fails, ids that sacct does not know have a `silence`.

    With `strict`, raises SlurmError when squeue is installed but fails: a live job must not be taken for an ended one.
    """
    wanted = list(job_ids)
    known: dict[str, SlurmJob] = {}
    silence, busy = "", False
    ways: dict[str, Ask] = {"squeue": partial(_squeue, user=user), "sacct": _sacct, "scontrol": _scontrol}
    for name, ask in ways.items():
        unknown = [job_id for job_id in wanted if job_id not in known]
        if not unknown or (busy and name == "scontrol"):  # it asks the controller, as squeue did
            continue
        try:
            found = ask(unknown)
        except NoSlurmError:
            continue
        except SlurmError as error:
            if name == "squeue":
                if strict:
                    raise
                silence, busy = f"Slurm does not answer ({error})", isinstance(error, BusyError)
            continue
        known |= {job.job_id: job for job in found}
    if silence:
        known |= {name: SlurmJob(name, "UNKNOWN", silence=silence) for name in wanted if name not in known}
    return known


def show_job(job_id: str) -> dict[str, str]:
    """Return the controller's fields of a job, e.g. JobState, Reason, Restarts and ExcNodeList."""
    return dict(re.findall(r"(\w+)=(\S+)", call("scontrol", "--oneliner", "show", "job", job_id)))


def seconds_left(job_id: str) -> float | None:
    """Return the seconds until the job's time limit; None for a job without a limit.

    Asks for the time left, not for the end date: clocks and date formats differ between machines.
    """
    return _seconds(call("squeue", "--noheader", "--jobs", job_id, "--format", "%L"))


def all_seconds_left(job_ids: Iterable[str]) -> dict[str, float]:
    """Return the same for several running jobs. Those without a limit are left out."""
    ids = ",".join(job_ids)
    lines = call("squeue", "--noheader", "--jobs", ids, "--format", "%i|%L").splitlines() if ids else []
    parts = (line.strip().partition("|") for line in lines)
    return {job_id: seconds for job_id, _, text in parts if (seconds := _seconds(text)) is not None}


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())  # [[days-]hours:]minutes:seconds
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def requeues_by_itself(job: dict[str, str]) -> bool:
    """Return whether Slurm requeues this running job by itself as soon as its batch script ends. `job`: see `show_job`.

    From 24.05 on it does so with a job that it preempts with REQUEUE, within the grace time too. It would do so a second time
    if `scontrol requeue` came before: a job that has completed would start again (seen with 24.11).
    """
    if job.get("PreemptTime", "None") == "None" or job.get("Requeue") != "1" or version() < (24, 5):
        return False
    try:
        mode = _preempt_mode(job)
    except SlurmError:  # Slurm does not tell, or this node has no sacctmgr
        return False
    return "REQUEUE" in mode.upper()


def _preempt_mode(job: dict[str, str]) -> str:
    """Return what preemption does to a job: the mode of its partition or QOS, else that of the cluster. Raises SlurmError."""
    settings = call("scontrol", "show", "config")
    if re.search(r"^PreemptType\s*=\s*preempt/partition_prio", settings, re.MULTILINE):
        settings = call("scontrol", "show", "partition", job.get("Partition", ""))
    elif job.get("QOS", "(null)") != "(null)":  # a QOS may have a mode of its own, and only the database knows it
        words = ("--noheader", "--parsable2", "show", "qos", job["QOS"], "format=PreemptMode")
        mode = call("sacctmgr", *words).strip()
        if mode not in ("", "cluster"):
            return mode
    match = re.search(r"\bPreemptMode\s*=\s*(\S+)", settings)
    return match[1] if match else ""


def version() -> tuple[int, int]:
    """Return the version of Slurm on this machine, e.g. (24, 11)."""
    match = re.search(r"(\d+)\.(\d+)", call("scontrol", "--version"))
    return (int(match[1]), int(match[2])) if match else (0, 0)


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
    lines = call("squeue", "--noheader", "--jobs", job_id, "--format", "%r|%S").strip().splitlines()
    reason, _, start = (lines[-1] if lines else "").partition("|")  # with SLURM_CLUSTERS, `CLUSTER: name` comes first
    return reason or "none", start or "N/A"


def partition_limit(name: str) -> str | None:
    """Return the longest time limit that a partition allows, as Slurm writes it."""
    match = re.search(r"MaxTime=(\S+)", call("scontrol", "show", "partition", name))
    return match.group(1) if match else None


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs with one call of scancel. A job that has just ended is no error."""
    try:
        call("scancel", *job_ids)
    except BusyError:
        raise
    except SlurmError as error:
        if not re.search("Invalid job id|already complet", str(error)):
            raise


def installed() -> bool:
    """Return whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def own_jobs() -> list[SlurmJob]:
    """Return all jobs of this user, also those that have just ended. Raises SlurmError."""
    printed = call("squeue", "--noheader", "--array", "--me", "--states=all", "--format", f"%o|{FIELDS}")
    rows = (line.partition("|") for line in printed.splitlines())
    found = [(_parse(line), script.strip()) for script, _, line in rows]
    return [replace(job, script=script) for job, script in found if job and slurm_array.ID.fullmatch(job.job_id)]


def accounted(job_ids: Iterable[str]) -> list[dict[str, str]]:
    """Return what accounting knows about the use of each job, its restarts and its steps: a line of sacct by the names in USE.

    Raises SlurmError, also where there is no accounting.
    """
    ids = ",".join(job_ids)
    if not ids:
        return []
    words = ("--noheader", "--allusers", "--duplicates", "--parsable2", "--units=M", f"--format={','.join(USE)}")
    lines = call("sacct", *words, "--jobs", ids).splitlines()
    return [dict(zip(USE, line.split("|"), strict=True)) for line in lines if line.count("|") == len(USE) - 1]


def _parse(line: str) -> SlurmJob | None:
    """Read a line `id|state|user|name|folder`, of which the end may be missing. Returns None for any other line."""
    job_id, _, rest = line.strip().partition("|")
    state, _, rest = rest.partition("|")
    if not job_id or not state:  # `CLUSTER: name`, which several clusters print
        return None
    user, _, rest = rest.partition("|")
    name, slash, folder = rest.partition("|/")  # a name may have a bar too
    return SlurmJob(job_id, state.split()[0], user, name, slash[1:] + folder)  # "CANCELLED by 1000"


def _squeue(job_ids: list[str], user: str | None) -> list[SlurmJob]:
    # On old versions one unknown id makes a whole --jobs list fail, so list all jobs of the user and pick ours.
    whose = "--me" if user is None else f"--user={user},{os.getuid()}"
    lines = call("squeue", "--noheader", "--array", whose, "--states=all", "--format", FIELDS).splitlines()
    return [job for line in lines if (job := _parse(line)) and job.job_id in job_ids]


def _sacct(job_ids: list[str]) -> list[SlurmJob]:
    fields, ids = "--format=JobID,State,User,JobName,WorkDir", ",".join(job_ids)
    words = ("--noheader", "--allocations", "--allusers", "--parsable2", fields, "--jobs", ids)
    found = (job for line in call("sacct", *words).splitlines() if (job := _parse(line)))
    tasks = (replace(job, job_id=job_id) for job in found for job_id in slurm_array.tasks_of(job.job_id))
    return [job for job in tasks if job.job_id in job_ids]


def _scontrol(job_ids: list[str]) -> list[SlurmJob]:
    known = []
    for job_id in job_ids:
        try:
            text = call("scontrol", "show", "job", job_id)
        except (NoSlurmError, BusyError):
            raise
        except SlurmError:
            continue
        if match := re.search(r"JobState=(\S+)", text):
            user, name, folder = (
                found[1].strip() if (found := re.search(pattern, text, re.MULTILINE)) else ""
                for pattern in (r"UserId=([^\s(]+)", r"JobName=(.*)$", r"^\s*WorkDir=(.*)$")
            )
            known.append(SlurmJob(job_id, match[1], user, name, folder))
    return known
