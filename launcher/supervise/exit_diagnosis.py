"""Finds the cause of an attempt's end, from what its ranks recorded, the watchdog's verdict, and srun's error output."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.files import read_json
from launcher.run_folder.status import BAD_NODE, COMPLETED, FAILED, NCCL, OUT_OF_MEMORY, PLANNED, PREEMPTED
from launcher.supervise import start_failures
from launcher.supervise.error_classes import HOST_MEMORY

CONNECTION_LOST = (
    "connection closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "timed out waiting",
    "recv failed",
    "remote process exit",
    "ncclremoteerror",
)
"""Errors of the other ranks when one has died. Such a rank is never the cause while any rank reports something else."""

OOM = re.compile(r"oom[-_ ]?kill|out of memory", re.IGNORECASE)
TASK = re.compile(r"srun: error: (\S+): tasks? (\d+)[^:]*: (.+)")
"""`srun: error: n2: task 3: Killed`: host, first task, and how it ended."""
LOST_NODE = re.compile(r"srun: error: (?:Node failure on (\S+)|Task launch for \S+ failed on node ([^\s:]+))")
STOP_SIGNALS = ("Terminated", "User defined signal")
"""How srun names the end of a rank that got a stop signal before it had installed its handlers."""

REMEDY = {
    OUT_OF_MEMORY: HOST_MEMORY,
    BAD_NODE: "if this happens again, exclude the node (cluster.train.exclude=NODE)",
    FAILED: "if nobody killed it by hand, read its log: muster logs RUN",
}
TAIL_LINES, TAIL_BYTES = 20, 16_384
MAX_LOGS = 32
"""How many logs of ranks without a record are searched for a failure at the start."""


def diagnose_exit(attempt: Path, code: int, world_size: int) -> dict[str, Any]:
    """Return status, reason, remedy, host, rank, traceback and last log lines of the rank that failed first.

    `attempt` is the folder attempt-N, `code` is the exit code of srun. The candidates, in order of precedence:

    1. the watchdog's verdict about a hang, unless a rank had failed before the hang;
    2. the first rank that recorded an error other than a lost connection;
    3. a lost node, or a rank that was killed by a signal, as srun reports it;
    4. what srun and the ranks without a record have printed, if that names a failure at the start;
    5. a planned stop (preemption, time limit, `stop`);
    6. the first rank that lost its connection;
    7. the exit code alone.
    """
    records = [record for path in sorted(attempt.glob("rank-*.json")) if (record := read_json(path))]
    errors = sorted((item for item in records if _is_failure(item)), key=lambda item: item["time"])
    causes = [item for item in errors if not any(phrase in item["reason"].lower() for phrase in CONNECTION_LOST)]
    planned = [item for item in records if item["status"] in PLANNED]
    cause = (
        _hang(attempt, causes)
        or next(iter(causes), None)
        or _from_srun(attempt, recorded_ranks={item["rank"] for item in records})
        or _from_logs(attempt, records, world_size)
        or _lowest_rank(planned)
        or next(iter(errors), None)
        or _from_exit_code(attempt, records, code, world_size)
    )
    verdict = {key: cause.get(key, "") for key in ("status", "reason", "remedy", "host", "rank", "error")}
    return verdict | {"log": log_tail(attempt, verdict["rank"]) if _is_failure(verdict) else ""}


def _is_failure(record: Mapping[str, Any]) -> bool:
    return record["status"] not in (COMPLETED, *PLANNED)


def _hang(attempt: Path, causes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the watchdog's verdict, unless a rank had failed before it: then the others hung because of that rank.

    An NCCL timeout does not count as such a failure: it is how a hang looks from inside a rank.
    """
    hang: dict[str, Any] | None = read_json(attempt / "hang.json")
    if hang and any(item["status"] != NCCL and item["time"] <= hang["time"] for item in causes):
        return None
    return hang


def _lowest_rank(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return min(records, key=lambda item: item["rank"], default=None)


def _from_srun(attempt: Path, *, recorded_ranks: set[int]) -> dict[str, Any] | None:
    """Return the lost node, or the rank that was killed before it could record anything; None if srun names neither.

    Uses only the first task that srun reports: with --kill-on-bad-exit, srun itself kills the other ranks after that.
    """
    text = file_tail(attempt / "srun.log")
    if lost := LOST_NODE.search(text):
        return _cause(
            BAD_NODE, f"node failure: {lost.group(0).removeprefix('srun: error: ')}", lost[1] or lost[2], None
        )
    task = TASK.search(text)
    # "Exited with exit code N" is a rank that ended by itself, and had the chance to record why.
    if not task or task[3].startswith("Exited") or int(task[2]) in recorded_ranks:
        return None
    node, rank, ending = task[1], int(task[2]), task[3].strip()
    if OOM.search(text) or OOM.search(log_tail(attempt, rank)):
        return _cause(OUT_OF_MEMORY, f"rank {rank} was killed: its node had no host memory left", node, rank)
    if ending.startswith(STOP_SIGNALS):
        return _cause(PREEMPTED, f"stopped by a signal during startup ({ending}); nothing new to save", node, rank)
    return _cause(FAILED, f"rank {rank} was killed by a signal ({ending}) before it could record why", node, rank)


def _from_logs(attempt: Path, records: Sequence[Mapping[str, Any]], world_size: int) -> dict[str, Any] | None:
    """Return the failure of a rank that could not record it: it ended before Muster's own code, or was never started."""
    if any(item["status"] == COMPLETED for item in records):  # then only rank 0 has a record
        return None
    recorded = {item["rank"] for item in records}
    silent = [rank for rank in range(world_size) if rank not in recorded][:MAX_LOGS]
    for rank in silent:
        if found := start_failures.find(log_tail(attempt, rank)):
            return {**found, "rank": rank, "host": ""}
    found = start_failures.find(file_tail(attempt / "srun.log")) if silent else None
    return {**found, "rank": None, "host": ""} if found else None


def _cause(status: str, reason: str, node: str, rank: int | None) -> dict[str, Any]:
    return {"status": status, "reason": reason, "remedy": REMEDY.get(status, ""), "host": node, "rank": rank}


def _from_exit_code(attempt: Path, records: Sequence[dict[str, Any]], code: int, world_size: int) -> dict[str, Any]:
    """Decide when no rank failed and srun named none: either rank 0 completed, or no rank recorded anything."""
    rank_0 = next((item for item in records if item["rank"] == 0), None)
    if rank_0 and code == 0:
        return rank_0
    if rank_0:
        reason = f"all ranks finished, but one was killed while exiting: srun exited with {code}"
    elif code == 0:
        reason = (
            f"srun exited with 0, but none of {world_size} ranks finished: check that srun could open its log files"
        )
    elif error := start_failures.last_error(file_tail(attempt / "srun.log")):
        reason = f"srun exited with {code} before the ranks could record why: {error}"
    else:
        reason = (
            f"the ranks were killed before they could record why (exit code {code}): out of host memory, or cancelled"
        )
    return _cause(FAILED, reason, "", None)


def log_tail(attempt: Path, rank: int | None) -> str:
    """Return the last lines of a rank's log, or of srun's own log for `rank` None. Skips the line with the environment."""
    path = attempt / ("srun.log" if rank is None else f"rank-{rank}.log")
    if rank is not None and not path.exists():
        # The local executor writes its logs beside the attempts; the newest log belongs to this attempt.
        path = max(attempt.parent.glob(f"*_{rank}_log.out"), key=lambda item: item.stat().st_mtime, default=path)
    lines = file_tail(path).splitlines()
    return "\n".join([line for line in lines if " INFO environment {" not in line][-TAIL_LINES:])


def file_tail(path: Path) -> str:
    """Return the last TAIL_BYTES of a file as text; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
