"""One attempt of a job, seen from its first node: `begin` before the ranks start, `finish` with the verdict after they ended.

Called by the batch script (`python -m launcher.attempt begin|finish JOB_FOLDER ...`) and by the local executor. Standard
library only: in a container job this runs outside, with whatever python3 the node has.
"""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import argparse
import json
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

from conf.files import read_json, write_json
from launcher import network, slurm

COMPLETED, PREEMPTED, FAILED = "completed", "preempted", "failed"
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


def begin(folder: Path, port: int | None = None) -> tuple[dict[str, str], socket.socket | None]:
    """Open the next attempt of the job in `folder`; with `port` (0: any free one) also find where its ranks meet.

    Returns the variables to export, and the socket that reserves the port while it stays open.
    Raises OSError when a port that was asked for by number is in use.
    """
    number = 1
    while True:
        try:
            (folder / f"attempt-{number}").mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    values = {"MUSTER_ATTEMPT": str(number)}
    write_json(
        folder / f"attempt-{number}" / "begin.json",
        {
            "host": socket.gethostname(),
            "job_id": os.environ.get("SLURM_JOB_ID", str(os.getpid())),
            "started": time.time(),
            "config": os.environ.get("MUSTER_CONFIG"),
        },
    )
    if port is None:
        return values, None
    held = network.reserve_port(port or _first_port(), only=port != 0)
    return values | {"MASTER_ADDR": _head(), "MASTER_PORT": str(held.getsockname()[1])}, held


def finish(folder: Path, number: int, code: int, world_size: int) -> dict[str, Any]:
    """Write attempt-N.json, the verdict, from what the ranks recorded and the exit code of srun, and return it.

    `completed` needs rank 0's word that all ranks were done: srun alone can exit 0 though nothing ran (Slurm < 23.11.4).
    """
    attempt = folder / f"attempt-{number}"
    opened = read_json(attempt / "begin.json") or {}
    records = [record for path in sorted(attempt.glob("rank-*.json")) if (record := read_json(path))]
    verdict = _judge(records, code, world_size)
    verdict |= {
        "step": _last_step(folder),
        "exit": code,
        "attempt": number,
        "job_id": opened.get("job_id"),
        "config": opened.get("config"),
        "started": opened.get("started"),
        "ended": time.time(),
    }
    write_json(folder / f"attempt-{number}.json", verdict)
    return verdict


def record(folder: Path, number: int, rank: int, status: str, reason: str = "", error: str = "", **more: Any) -> None:
    """What one rank has to say at its end; only rank 0 speaks when all went well."""
    write_json(
        folder / f"attempt-{number}" / f"rank-{rank}.json",
        {
            "status": status,
            "reason": reason,
            "error": error,
            "rank": rank,
            "host": socket.gethostname(),
            "time": time.time(),
            **more,
        },
    )


def last_verdict(folder: Path) -> dict[str, Any] | None:
    """The verdict of a job's newest attempt; None when there was none, or it ended without one."""
    number = _newest(folder)
    found = read_json(folder / f"attempt-{number}.json") if number else None
    return found if isinstance(found, dict) else None


def _newest(folder: Path) -> int | None:
    """Number of the newest attempt of a job; None before the first."""
    numbers = (int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-*") if path.is_dir())
    return max(numbers, default=None)


def _judge(records: list[dict[str, Any]], code: int, world_size: int) -> dict[str, Any]:
    errors = [item for item in records if item["status"] not in (COMPLETED, PREEMPTED)]
    if errors:
        first = min(errors, key=lambda item: (any(word in item["reason"].lower() for word in VICTIM), item["time"]))
        return {key: first[key] for key in ("status", "reason", "host", "rank", "error")}
    head = next((item for item in records if item["rank"] == 0 or item["status"] == PREEMPTED), None)
    if head and (code == 0 or head["status"] == PREEMPTED):
        return {key: head[key] for key in ("status", "reason", "host", "rank", "error")}
    if head:
        reason = f"all ranks were done, but srun exited with {code}: one was killed on its way out"
    elif code == 0:
        reason = f"srun exited with 0, but none of {world_size} ranks ran to its end: could srun open its log files?"
    else:
        reason = f"the ranks were killed before they could say why (exit code {code}): out of host memory, or cancelled"
    return {"status": FAILED, "reason": reason, "host": socket.gethostname(), "rank": None, "error": ""}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; one that is being written is passed over."""
    found, path = [], run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _last_step(folder: Path) -> int | None:
    lines = metrics(folder.parent.parent) if folder.name == "train" else []
    return next((int(line["step"]) for line in reversed(lines) if "step" in line), None)


def _first_port() -> int:
    return network.first_port(
        int(os.environ.get("SLURM_JOB_ID", os.getpid())), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    )


def _head() -> str:
    """Name of the allocation's first host, or its NodeAddr where the name leads nowhere; this host outside Slurm."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist or os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return "127.0.0.1"
    head = slurm.hostnames(nodelist)[0]
    return head if network.resolves(head) else slurm.node_address(head) or head


def _hold(held: socket.socket) -> None:
    """Keep the port until the batch script is gone, however it ends: until nobody can read this process's pipe any more."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)  # errors and hang-ups only
    watch.poll()
    held.close()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.attempt", description=__doc__)
    parser.add_argument("action", choices=["begin", "finish"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, help="begin: reserve this port for MASTER_PORT, or with 0 a free one")
    parser.add_argument("--code", type=int, default=0, help="finish: exit code of srun")
    parser.add_argument("--world-size", type=int, default=1)
    options = parser.parse_args(words)
    if options.action == "finish":
        verdict = finish(options.folder, int(os.environ["MUSTER_ATTEMPT"]), options.code, options.world_size)
        print(f"muster: {options.folder.name} {verdict['status']} {verdict['reason']}".rstrip(), flush=True)
        return 0 if verdict["status"] == COMPLETED else 1
    try:
        values, held = begin(options.folder, options.port)
    except (OSError, slurm.SlurmError) as error:
        return _refuse(options.folder, options.port, error)
    print("\n".join([*(f"{key}={value}" for key, value in values.items()), "ready"]), flush=True)
    if held:
        _hold(held)
    return 0


def _refuse(folder: Path, port: int | None, error: Exception) -> int:
    """The job cannot start: say so in a verdict, as for any other failure."""
    number = _newest(folder)
    if number is None:
        print(f"muster: {folder} cannot be written: {error}", file=sys.stderr, flush=True)
        return 2
    taken = f"cluster.network.master_port={port}: " if port else ""
    remedy = "; leave it null, so that a free one is found" if port else ""
    record(
        folder,
        number,
        0,
        "user_error" if port else FAILED,
        f"{taken}{getattr(error, 'strerror', None) or error} on {socket.gethostname()}{remedy}",
    )
    verdict = finish(folder, number, 2, 1)
    print(f"muster: {verdict['reason']}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
