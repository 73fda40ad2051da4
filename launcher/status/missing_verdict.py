"""Says why a job ended that left no verdict: its batch script died before an attempt began, or Slurm ended it at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from launcher import slurm
from launcher.run_folder.status import BAD_NODE, FAILED, OUT_OF_MEMORY, PREEMPTED, STOPPED, TIME_LIMIT, USER_ERROR
from launcher.supervise import start_failures
from launcher.supervise.error_classes import HOST_MEMORY
from launcher.supervise.exit_diagnosis import file_tail, log_tail
from launcher.supervise.requeue import RESUME

LOG_LINES = 20
BY_STATE = {
    "NODE_FAIL": (BAD_NODE, "Slurm lost a node of the job", start_failures.NODE),
    "BOOT_FAIL": (BAD_NODE, "a node of the job did not boot in time", start_failures.NODE),
    "OUT_OF_MEMORY": (
        OUT_OF_MEMORY,
        "Slurm killed the job: it used more host memory than it had asked for",
        HOST_MEMORY,
    ),
    "DEADLINE": (
        USER_ERROR,
        "the job could not end before its deadline",
        "set a later deadline in the sbatch options of the job's section of cluster, or a shorter time_min",
    ),
    "TIMEOUT": (
        TIME_LIMIT,
        "the time limit was over before its ranks could save",
        "raise time_min in the job's section of cluster",
    ),
    "PREEMPTED": (PREEMPTED, "another job took its nodes, and Slurm did not put it back into the queue", ""),
    "REVOKED": (
        STOPPED,
        "its copy on another cluster of the federation was started instead",
        "look there: squeue --federation",
    ),
}
"""Slurm's states that say themselves why a job ended: (status, reason, remedy)."""
FORGOTTEN = "UNKNOWN"
"""The state of a job that Slurm no longer knows. Another cluster that shares the disk may run it."""
QUIET_S = 120.0
"""A script that has written to its log, but opened no attempt for so long, has ended."""
WITHOUT_A_CAUSE = ("FAILED", "COMPLETED", "LAUNCH_FAILED", "SPECIAL_EXIT", "RECONFIG_FAIL")
"""Slurm's states of a job whose logs must say why it ended."""
UNOPENED_LOG = "0:53"
"""Slurm's exit code of a job whose log it could not open."""


def explain(folder: Path, job_id: str, state: str, attempt: int | None) -> dict[str, Any] | None:
    """Return a verdict for a job of Slurm that ended in `state` and has none; None for a job that has not ended.

    `folder` is the job's folder; `attempt` is None if it opened no attempt.
    """
    if state in BY_STATE:
        status, reason, remedy = BY_STATE[state]
        text = _logs(folder, job_id, attempt)
        return _verdict({"status": status, "reason": f"{reason} ({state})", "remedy": remedy}, text)
    if state == "CANCELLED":
        return _verdict({"status": STOPPED, "reason": _cancelled(job_id, attempt), "remedy": ""}, "")
    if state in WITHOUT_A_CAUSE or (state == FORGOTTEN and attempt is None and _is_quiet(folder, job_id)):
        return _from_logs(folder, job_id, state, attempt)
    return None


def _is_quiet(folder: Path, job_id: str) -> bool:
    try:
        return time.time() - (folder / f"{job_id}_0_log.out").stat().st_mtime > QUIET_S
    except OSError:
        return False


def _from_logs(folder: Path, job_id: str, state: str, attempt: int | None) -> dict[str, Any]:
    text = _logs(folder, job_id, attempt)
    code = _field(job_id, "ExitCode")
    found = start_failures.find(text)
    if found is None and code == UNOPENED_LOG:
        found = {
            "status": USER_ERROR,
            "reason": "Slurm could not open the log of the job on its node",
            "remedy": f"does {folder} exist there, and can you write it? Every node must see the run folder",
        }
    if found is None:
        lines = text.strip().splitlines()
        when = "before an attempt began" if attempt is None else "before the verdict was written"
        who = "Slurm no longer knows the job: it" if state == FORGOTTEN else "the batch script"
        exit_code = f" with exit code {code.partition(':')[0]}" if code else ""
        last_line = start_failures.last_error(text) or (lines[-1].strip() if lines else "it printed nothing")
        # A line of cluster.setup that ends the script would do so again; a traceback may be anything.
        status = USER_ERROR if attempt is None and "Traceback" not in text and state == "FAILED" else FAILED
        reason = f"{who} ended{exit_code} {when}: {last_line[: start_failures.LONGEST_REASON]}"
        found = {"status": status, "reason": reason, "remedy": start_failures.SCRIPT if status == USER_ERROR else ""}
    return _verdict(found, text)


def _verdict(found: dict[str, str], log: str) -> dict[str, Any]:
    lines = log.strip().splitlines()[-LOG_LINES:]
    more = {"rank": None, "host": "", "error": "", "log": "\n".join(lines), "requeued": False, "next": RESUME}
    return {**found, **more}


def _logs(folder: Path, job_id: str, attempt: int | None) -> str:
    """Return the last lines of the job's logs: of rank 0 and of srun if an attempt began, then of the batch script."""
    texts = [file_tail(folder / f"{job_id}_0_log.out")]
    if attempt is not None:
        texts[:0] = [log_tail(folder / f"attempt-{attempt}", rank) for rank in (0, None)]
    return "\n".join(texts)


def _cancelled(job_id: str, attempt: int | None) -> str:
    """Say who cancelled a job. Without accounting, Slurm does not know."""
    if "Dependency" in _field(job_id, "Reason"):
        return "not started: a job that it needs did not complete"
    try:
        name = slurm.cancelled_by(job_id)
    except slurm.SlurmError:
        name = ""
    by = f" by {name}" if name else ""
    return f"cancelled{by} " + ("before it started" if attempt is None else "before its ranks could save")


def _field(job_id: str, name: str) -> str:
    """Return what the controller still knows about an ended job; empty if it has forgotten the job."""
    try:
        return slurm.show_job(job_id).get(name, "")
    except slurm.SlurmError:
        return ""
