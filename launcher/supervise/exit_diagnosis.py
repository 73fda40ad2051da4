"""Finds the one cause of an attempt's end, in what its ranks recorded and what srun said of them."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import re
from pathlib import Path
from typing import Any

from conf.files import read_json
from launcher.run_folder.status import BAD_NODE, COMPLETED, FAILED, NCCL, OUT_OF_MEMORY, PLANNED, PREEMPTED
from launcher.supervise.error_classes import HOST_MEMORY

VICTIM = (
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
"""What the other ranks say when one has died: never the cause while any rank says something else."""

OOM = re.compile(r"oom[-_ ]?kill|out of memory", re.IGNORECASE)
TASK = re.compile(r"srun: error: (\S+): tasks? (\d+)[^:]*: (.+)")
LOST = re.compile(r"srun: error: (?:Node failure on (\S+)|Task launch for \S+ failed on node ([^\s:]+))")
TOLD = ("Terminated", "User defined signal")
"""srun's words for a rank that was told to stop before it could listen."""

REMEDY = {
    OUT_OF_MEMORY: HOST_MEMORY,
    BAD_NODE: "leave the node out (cluster.train.exclude=NODE) if this comes again",
    FAILED: "where nobody killed it by hand, its log says more: python -m launcher logs RUN",
}
TAIL_LINES, TAIL_BYTES = 20, 16_384


def judge(attempt: Path, code: int, world_size: int) -> dict[str, Any]:
    """Status, reason, remedy, host, rank, traceback and last log lines of the rank that was first to fail."""
    records = [record for path in sorted(attempt.glob("rank-*.json")) if (record := read_json(path))]
    errors = sorted(
        (item for item in records if item["status"] not in (COMPLETED, *PLANNED)), key=lambda item: item["time"]
    )
    causes = [item for item in errors if not any(word in item["reason"].lower() for word in VICTIM)]
    told = [item for item in records if item["status"] in PLANNED]
    found = _hang(attempt, causes) or next(iter(causes), None)
    found = found or _said_by_srun(attempt, {item["rank"] for item in records})
    if found is None:
        found = _head(told) or next(iter(errors), None) or _silent(records, code, world_size)
    verdict = {key: found.get(key, "") for key in ("status", "reason", "remedy", "host", "rank", "error")}
    failed = verdict["status"] not in (COMPLETED, *PLANNED)
    return verdict | {"log": log_tail(attempt, verdict["rank"]) if failed else ""}


def _hang(attempt: Path, causes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the watchdog found, unless a rank had failed before: the others then hung because of it. A time-out of NCCL is
    what a hang looks like from inside, and no cause."""
    found: dict[str, Any] | None = read_json(attempt / "hang.json")
    if found and any(item["status"] != NCCL and item["time"] <= found["time"] for item in causes):
        return None
    return found


def _head(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return min(records, key=lambda item: item["rank"]) if records else None


def _said_by_srun(attempt: Path, spoken: set[int]) -> dict[str, Any] | None:
    """The node that was lost, or the rank that was killed before it could record anything; None where srun names none.

    Only srun's first line counts: with --kill-on-bad-exit it ends the other ranks itself.
    """
    text = _end(attempt / "srun.log")
    if lost := LOST.search(text):
        return _cause(
            BAD_NODE, f"node failure: {lost.group(0).removeprefix('srun: error: ')}", lost[1] or lost[2], None
        )
    first = TASK.search(text)
    if not first or first[3].startswith("Exited") or int(first[2]) in spoken:
        return None
    node, rank, word = first[1], int(first[2]), first[3].strip()
    if OOM.search(text) or OOM.search(log_tail(attempt, rank)):
        return _cause(OUT_OF_MEMORY, f"rank {rank} was killed: its node had no host memory left", node, rank)
    if word.startswith(TOLD):
        return _cause(PREEMPTED, f"told to stop while it started ({word}); nothing new to save", node, rank)
    return _cause(FAILED, f"rank {rank} was ended by a signal ({word}) before it could say why", node, rank)


def _cause(status: str, reason: str, node: str, rank: int | None) -> dict[str, Any]:
    return {"status": status, "reason": reason, "remedy": REMEDY.get(status, ""), "host": node, "rank": rank}


def _silent(records: list[dict[str, Any]], code: int, world_size: int) -> dict[str, Any]:
    """No rank failed: rank 0 was done, or none had a word to say."""
    head = next((item for item in records if item["rank"] == 0), None)
    if head and code == 0:
        return head
    if head:
        reason = f"all ranks were done, but srun exited with {code}: one was killed on its way out"
    elif code == 0:
        reason = f"srun exited with 0, but none of {world_size} ranks ran to its end: could srun open its log files?"
    else:
        reason = f"the ranks were killed before they could say why (exit code {code}): out of host memory, or cancelled"
    return _cause(FAILED, reason, "", None)


def log_tail(attempt: Path, rank: int | None) -> str:
    """The last lines of a rank's log, or of srun's own; the local executor has logs of its own, the newest is this attempt's."""
    path = attempt / ("srun.log" if rank is None else f"rank-{rank}.log")
    if rank is not None and not path.exists():
        path = max(attempt.parent.glob(f"*_{rank}_log.out"), key=lambda item: item.stat().st_mtime, default=path)
    lines = _end(path).splitlines()
    return "\n".join([line for line in lines if " INFO environment {" not in line][-TAIL_LINES:])


def _end(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
