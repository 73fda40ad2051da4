"""Asks Slurm about jobs and changes them, and parses what its commands print; no other module of the launcher calls Slurm.

Standard library only: this file also runs on the compute node, outside the container, before any environment is set up.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.slurm_command import BusyError, NoSlurmError, SlurmError, call, retrying, run_once, wait_after

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

FIELDS = "%i|%T|%u|%j|%Z"
"""squeue's format of what `_parse` reads."""
SBATCH_TIMEOUT_S = 120.0
"""A site's checks at submission may take a minute."""
SETTLE_S = 5.0
"""How long a controller that answers again may still take to queue what it received before it stalled."""


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


def hostnames(nodelist: str) -> list[str]:
    """Expand a node list: `n[1-2]` becomes n1, n2. Ranks are numbered in this order."""
    return call("scontrol", "show", "hostnames", nodelist).split()


def node_address(node: str) -> str | None:
    """Return the address that the controller uses for a node (NodeAddr), for clusters whose node names do not resolve."""
    match = re.search(r"NodeAddr=(\S+)", call("scontrol", "show", "node", node))
    return match.group(1) if match else None


def jobs(job_ids: Iterable[str], user: str | None = None, strict: bool = False) -> dict[str, SlurmJob]:
    """Return what Slurm knows about each id. Ids that it no longer knows are left out.

    Slurm may give an id again (to another user too), so compare the job's folder before changing anything.
    Asks squeue for live jobs of `user` (default: this one), then sacct for ended ones. Without accounting, scontrol still
    remembers an ended job for MinJobAge (5 min). If squeue fails, ids that sacct does not know have a `silence`.

    With `strict`, raises SlurmError when squeue is installed but fails: a live job must not be taken for an ended one.
    """
    wanted = list(job_ids)
    known: dict[str, SlurmJob] = {}
    silence, busy = "", False
    for name in ("squeue", "sacct", "scontrol"):
        unknown = [job_id for job_id in wanted if job_id not in known]
        if not unknown or (busy and name == "scontrol"):  # it asks the controller, as squeue did
            continue
        try:
            found = (
                _squeue(unknown, user)
                if name == "squeue"
                else _sacct(unknown)
                if name == "sacct"
                else _scontrol(unknown)
            )
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
    text = call("squeue", "--noheader", "--jobs", job_id, "--format", "%L").strip()
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)  # [[days-]hours:]minutes:seconds
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
    settings = call("scontrol", "show", "config")
    if re.search(r"^PreemptType\s*=\s*preempt/partition_prio", settings, re.MULTILINE):
        settings = call("scontrol", "show", "partition", job.get("Partition", ""))
    elif job.get("QOS", "(null)") != "(null)":  # a QOS may have a mode of its own, and only the database knows it
        words = ("--noheader", "--parsable2", "show", "qos", job["QOS"], "format=PreemptMode")
        mode = call("sacctmgr", *words).strip()
        if mode not in ("", "cluster"):
            settings = f"PreemptMode={mode}"
    mode_of_job = re.search(r"\bPreemptMode\s*=\s*(\S+)", settings)
    return mode_of_job is not None and "REQUEUE" in mode_of_job[1].upper()


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


def pending_reason(job_id: str) -> tuple[str, str]:
    """Return why a job is pending, and when Slurm expects to start it (`N/A` if Slurm does not know)."""
    out = call("squeue", "--noheader", "--jobs", job_id, "--format", "%r|%S").strip()
    reason, _, start = out.partition("|")
    return reason or "none", start or "N/A"


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


def submit(script: Path, is_ours: Callable[[SlurmJob], bool]) -> str:
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
    if others := [job.job_id for job in found if job.job_id != job_id and job.state in LIVE_STATES]:
        cancel(others)
    return job_id


def submitted_id(printed: str) -> str | None:
    """Return the job id in what sbatch printed. A site's sbatch may print more lines, before and after it."""
    for pattern in (r"^Submitted batch job (\d+)\b", r"^(\d+)(?:;\S+)?\s*$"):  # the second: with --parsable
        if found := re.findall(pattern, printed, re.MULTILINE):
            return str(found[-1])
    return None


def _jobs_of_script(script: Path, is_ours: Callable[[SlurmJob], bool]) -> list[SlurmJob]:
    """Return the jobs of a script, oldest first. Asks twice, so that the controller has time to queue what it had received."""
    found: list[SlurmJob] = []
    for pause_s in (0.0, SETTLE_S):
        time.sleep(pause_s)
        found = [job for job in own_jobs() if job.script == str(script) or is_ours(job)]
        if found:
            break
    return sorted(found, key=lambda job: int(job.job_id))


def own_jobs() -> list[SlurmJob]:
    """Return all jobs of this user, also those that have just ended. Raises SlurmError."""
    printed = call("squeue", "--noheader", "--me", "--states=all", "--format", f"%o|{FIELDS}")
    rows = (line.partition("|") for line in printed.splitlines())
    found = [(_parse(line), script.strip()) for script, _, line in rows]
    return [replace(job, script=script) for job, script in found if job and job.job_id.isdigit()]


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
    whose = "--me" if user is None else f"--user={user}"
    lines = call("squeue", "--noheader", whose, "--states=all", "--format", FIELDS).splitlines()
    return [job for line in lines if (job := _parse(line)) and job.job_id in job_ids]


def _sacct(job_ids: list[str]) -> list[SlurmJob]:
    fields, ids = "--format=JobID,State,User,JobName,WorkDir", ",".join(job_ids)
    words = ("--noheader", "--allocations", "--allusers", "--parsable2", fields, "--jobs", ids)
    return [job for line in call("sacct", *words).splitlines() if (job := _parse(line)) and job.job_id in job_ids]


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
