"""One attempt of a job, seen from its first node: `begin` before the ranks start, `finish` with the verdict after they ended.

Called by the batch script (`python -m launcher.supervise.attempt begin|finish JOB_FOLDER ...`) and by the local executor. Standard
library only: in a container job this runs outside, with whatever python3 the node has.
"""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import argparse
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

from conf.files import write_json
from launcher import slurm
from launcher.run_folder import attempts
from launcher.run_folder.status import COMPLETED, FAILED, USER_ERROR
from launcher.supervise import rendezvous, requeue
from launcher.supervise.exit_diagnosis import judge


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
    opened = {
        "host": host(),
        "job_id": os.environ.get("SLURM_JOB_ID", str(os.getpid())),
        "started": time.time(),
        "config": os.environ.get("MUSTER_CONFIG"),
        "resumed": attempts.last_saved(folder),
    }
    write_json(folder / f"attempt-{number}" / "begin.json", opened)
    _tidy(folder, number, opened)
    if port is None:
        return values, None
    held = rendezvous.reserve_port(port or _first_port(), only=port != 0)
    return values | {"MASTER_ADDR": _head(), "MASTER_PORT": str(held.getsockname()[1])}, held


def finish(folder: Path, number: int, code: int, world_size: int) -> dict[str, Any]:
    """Write attempt-N.json, the verdict, from what the ranks recorded and the exit code of srun, and return it.

    `completed` needs rank 0's word that all ranks were done: srun alone can exit 0 though nothing ran (Slurm < 23.11.4).
    """
    attempt = folder / f"attempt-{number}"
    opened = attempts.opened(folder, number)
    verdict = judge(attempt, code, world_size)
    verdict |= {
        "host": verdict["host"] or host(),
        "step": attempts.last_step(folder),
        "saved": attempts.last_saved(folder),
        "exit": code,
        "attempt": number,
        "ended": time.time(),
        **{key: opened.get(key) for key in ("job_id", "config", "started", "resumed")},
    }
    write_json(folder / f"attempt-{number}.json", verdict)
    return verdict


def adopt(folder: Path, number: int, world_size: int, max_restarts: int | None) -> None:
    """What rank 0 does once its work is saved: where the batch script was killed, the verdict and the requeue in its place."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    try:
        if requeue.standing(os.environ["SLURM_JOB_ID"], restarts) != requeue.ORPHANED:
            return
    except (KeyError, slurm.SlurmError):  # outside Slurm, or in a container: nobody to ask
        return
    requeue.settle(folder, finish(folder, number, 137, world_size), max_restarts, restarts)


def record(folder: Path, number: int, rank: int, status: str, reason: str = "", error: str = "", **more: Any) -> None:
    """What one rank has to say at its end; only rank 0 speaks when all went well."""
    write_json(
        folder / f"attempt-{number}" / f"rank-{rank}.json",
        {
            "status": status,
            "reason": reason,
            "error": error,
            "rank": rank,
            "host": host(),
            "time": time.time(),
            **more,
        },
    )


def _tidy(folder: Path, number: int, opened: dict[str, Any]) -> None:
    """Leave nothing of the attempt before that would mislead this one: its verdict is written where it could not."""
    (folder / "stop").unlink(missing_ok=True)
    for path in folder.glob("*.save_tmp"):
        path.unlink(missing_ok=True)  # submitit refuses to write a result beside one that was cut short
    before = attempts.opened(folder, number - 1)
    if before.get("job_id") != opened["job_id"] or (folder / f"attempt-{number - 1}.json").exists():
        return
    reason = "Slurm ended it before the ranks had saved: a lost node, preemption without enough grace, or a killed batch script"
    verdict = {
        "status": FAILED,
        "reason": reason,
        "remedy": "",
        "host": before.get("host"),
        "rank": None,
        "error": "",
        "log": "",
    }
    verdict |= {"step": attempts.last_step(folder), "saved": opened["resumed"], "exit": None, "attempt": number - 1}
    verdict |= {"ended": opened["started"], "requeued": True, "next": requeue.BY_SLURM}
    verdict |= {key: before.get(key) for key in ("job_id", "config", "started", "resumed")}
    write_json(folder / f"attempt-{number - 1}.json", verdict)


def host() -> str:
    """This node as Slurm calls it, so that it can be excluded by that name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _first_port() -> int:
    return rendezvous.first_port(
        int(os.environ.get("SLURM_JOB_ID", os.getpid())), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    )


def _head() -> str:
    """Name of the allocation's first host, or its NodeAddr where the name leads nowhere; this host outside Slurm."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist or os.environ.get("SUBMITIT_EXECUTOR") == "local":
        return "127.0.0.1"
    head = slurm.hostnames(nodelist)[0]
    return head if rendezvous.resolves(head) else slurm.node_address(head) or head


def _hold(held: socket.socket) -> None:
    """Keep the port until the batch script is gone, however it ends: until nobody can read this process's pipe any more."""
    watch = select.poll()
    watch.register(sys.stdout.fileno(), 0)  # errors and hang-ups only
    watch.poll()
    held.close()


def _stop_at(before_s: float) -> dict[str, str]:
    """MUSTER_STOP_AT, the time at which the ranks save and stop by themselves, whether or not Slurm's signal reaches them.

    Not before half of the time is over: a limit shorter than the warning would leave no time for a single step.
    """
    try:
        left_s = slurm.seconds_left(os.environ["SLURM_JOB_ID"])
    except (KeyError, slurm.SlurmError):
        return {}
    return {} if left_s is None else {"MUSTER_STOP_AT": str(round(time.time() + max(left_s - before_s, left_s / 2)))}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.supervise.attempt", description=__doc__)
    parser.add_argument("action", choices=["begin", "finish"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, help="begin: reserve this port for MASTER_PORT, or with 0 a free one")
    parser.add_argument("--stop-before", type=float, help="begin: seconds before the time limit at which ranks stop")
    parser.add_argument("--code", type=int, default=0, help="finish: exit code of srun")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--max-restarts", type=int, help="finish: of a failing job; without it there is none of any")
    options = parser.parse_args(words)
    if options.action == "finish":
        return _finish(options)
    try:
        values, held = begin(options.folder, options.port)
    except (OSError, slurm.SlurmError) as error:
        return _refuse(options, error)
    if options.stop_before is not None:
        values |= _stop_at(options.stop_before)
    print("\n".join([*(f"{key}={value}" for key, value in values.items()), "ready"]), flush=True)
    if held:
        _hold(held)
    return 0


def _finish(options: argparse.Namespace) -> int:
    verdict = finish(options.folder, int(os.environ["MUSTER_ATTEMPT"]), options.code, options.world_size)
    if verdict["status"] != COMPLETED and "SLURM_JOB_ID" in os.environ:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        verdict = requeue.settle(options.folder, verdict, options.max_restarts, restarts)
    then = f"; {verdict['next']}" if verdict.get("next") else ""
    print(f"muster: {options.folder.name} {verdict['status']} {verdict['reason']}".rstrip() + then, flush=True)
    return 0 if verdict["status"] == COMPLETED else 1


def _refuse(options: argparse.Namespace, error: Exception) -> int:
    """The job cannot start: say so in a verdict, as for any other failure."""
    folder, port, number = options.folder, options.port, attempts.newest(options.folder)
    if number is None:
        print(f"muster: {folder} cannot be written: {error}", file=sys.stderr, flush=True)
        return 2
    taken = f"cluster.network.master_port={port}: " if port else ""
    remedy = "; leave it null, so that a free one is found" if port else ""
    record(
        folder,
        number,
        0,
        USER_ERROR if port else FAILED,
        f"{taken}{getattr(error, 'strerror', None) or error} on {socket.gethostname()}{remedy}",
    )
    verdict = finish(folder, number, 2, 1)
    print(f"muster: {verdict['reason']}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
