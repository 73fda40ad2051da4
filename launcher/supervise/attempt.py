"""Opens and closes one attempt of a job on its first node: `begin` before the ranks start, `finish` after they have ended.

Called by the batch script (`python -m launcher.supervise.attempt begin|finish JOB_FOLDER ...`) and by the local executor.
Standard library only: in a container job this runs outside the container, with the node's own python3.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import argparse
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import Any

from conf import node_paths, program_checkpoints, sweep
from conf.errors import ConfigError
from conf.files import write_json
from conf.jobs import RESUMABLE
from conf.visible import visible
from launcher import slurm, slurm_array
from launcher.run_folder import attempts
from launcher.run_folder.status import COMPLETED, FAILED, USER_ERROR
from launcher.supervise import allocation, rendezvous, report_page, requeue
from launcher.supervise.error_classes import classify
from launcher.supervise.exit_diagnosis import diagnose_exit

COPIED_FROM_BEGIN = ("job_id", "config", "started", "resumed", "gpus")
"""Fields of begin.json that the verdict repeats."""


def begin(folder: Path, port: int | None = None) -> tuple[dict[str, str], socket.socket | None]:
    """Open the next attempt of the job in `folder`. With `port`, also reserve MASTER_PORT (0: any free port).

    Returns the variables to export, and the socket that reserves the port until it is closed.
    Raises OSError if a port that was asked for by number is in use, and ConfigError if this node lacks a variable or a name.
    """
    number = 1
    while True:
        try:
            (folder / f"attempt-{number}").mkdir(parents=True)  # atomic, so two starts never share a number
            break
        except FileExistsError:
            number += 1
    _remove_leftovers(folder)
    begin_record = {
        "host": allocation.host(),
        "job_id": slurm_array.own_id(os.environ) or str(os.getpid()),
        "started": time.time(),
        "config": os.environ.get("MUSTER_CONFIG"),
        "gpus": int(os.environ.get("MUSTER_GPUS", "0")),
        "resumed": attempts.newest_checkpoint(folder),
    }
    if "MUSTER_SWEEP" in os.environ:
        begin_record["folder"] = ".."  # where the Slurm job starts, see record.newest_jobs
    write_json(folder / f"attempt-{number}" / "begin.json", begin_record)
    close_unfinished_attempt(folder, number - 1, begin_record)
    values = {"MUSTER_ATTEMPT": str(number)}
    for need in os.environ.get("MUSTER_NEEDS", "").split():  # NAME:KEY of variables that the batch script will expand
        name, _, key = need.partition(":")
        node_paths.expanded(f"${name}", key)
    if port is None:
        return values, None
    address = allocation.master_address()
    reservation = rendezvous.reserve_port(port or allocation.first_port(), only=port != 0)
    return values | {"MASTER_ADDR": address, "MASTER_PORT": str(reservation.getsockname()[1])}, reservation


def finish(folder: Path, number: int, code: int, world_size: int) -> dict[str, Any]:
    """Write attempt-N.json, the verdict, from the ranks' records and srun's exit code `code`. Returns the verdict.

    `completed` needs a record of rank 0, written when all ranks were done. The exit code is not enough: before
    Slurm 23.11.4, srun may exit with 0 although nothing ran.
    """
    begin_record = attempts.begin_record(folder, number)
    verdict = diagnose_exit(folder / f"attempt-{number}", code, world_size)
    verdict |= {
        "host": verdict["host"] or allocation.host(),
        "step": attempts.last_step(folder),
        "saved": attempts.newest_checkpoint(folder),
        "exit": code,
        "attempt": number,
        "ended": time.time(),
        **{key: begin_record.get(key) for key in COPIED_FROM_BEGIN},
    }
    if verdict["status"] == COMPLETED and folder.name in RESUMABLE:
        verdict |= _end_among_the_worst(folder.parent.parent, verdict["step"])
    write_json(folder / f"attempt-{number}.json", verdict)
    if folder.name in RESUMABLE:
        report_page.settle(folder.parent.parent, verdict)
    return verdict


def _end_among_the_worst(run: Path, step: int | None) -> dict[str, Any]:
    """Return what a verdict says of a training that ended at `step` as one of the worst of a sweep (`sweep.stop_worst`)."""
    rung = attempts.read_record(run / sweep.RUNG) or {}
    if rung.get("goes_on") is not False or rung.get("ended") != step:  # it was continued afterwards
        return {}
    return {"reason": str(rung.get("reason", "")), "ended_early": True}


def finish_for_killed_script(folder: Path, number: int, world_size: int, max_restarts: int | None) -> None:
    """Write the verdict and requeue the job if its batch script was killed. Rank 0 calls this after its work is saved."""
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # a job around it is none of ours
        return
    restarts, job_id = int(os.environ.get("SLURM_RESTART_COUNT", 0)), slurm_array.own_id(os.environ)
    if job_id is None:
        return
    try:
        with slurm.retrying():
            if requeue.view_of_job(job_id, restarts) is not requeue.SlurmView.ORPHANED:
                return
    except slurm.SlurmError:  # in a container without Slurm's commands
        return
    verdict = finish(folder, number, 137, world_size)  # 137: as if the script had seen SIGKILL
    requeue.decide_and_requeue(folder, verdict, max_restarts, restarts)


def record_end(
    folder: Path, number: int, rank: int, status: str, reason: str = "", error: str = "", **more: Any
) -> None:
    """Write rank-R.json: how one rank ended. `error` is the traceback. If all goes well, only rank 0 calls this."""
    write_json(
        folder / f"attempt-{number}" / f"rank-{rank}.json",
        {
            "status": status,
            "reason": reason,
            "error": error,
            "rank": rank,
            "host": allocation.host(),
            "time": time.time(),
            **more,
        },
    )


def _remove_leftovers(folder: Path) -> None:
    """Delete files of earlier attempts that would stop or break this one."""
    for name in ("stop", "save"):  # an earlier attempt was asked for it
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("*.save_tmp"):
        path.unlink(missing_ok=True)  # submitit refuses to write a result beside one that was cut short
    if folder.name == "custom":
        for line in program_checkpoints.set_aside(folder.parent.parent / "checkpoints"):
            print(visible(f"muster: {line}"), file=sys.stderr, flush=True)


def close_unfinished_attempt(folder: Path, number: int, next_begin: dict[str, Any]) -> None:
    """Write the verdict of attempt `number` if Slurm ended it before it could, and then started the job again.

    `next_begin` is the begin.json of the attempt that follows. Attempts of another Slurm job are left alone.
    """
    begin_record = attempts.begin_record(folder, number)
    if begin_record.get("job_id") != next_begin["job_id"] or (folder / f"attempt-{number}.json").exists():
        return
    reason = (
        "Slurm ended the job before its ranks had saved: a lost node, preemption with too little grace time, "
        "or a killed batch script"
    )
    verdict = {
        "status": FAILED,
        "reason": reason,
        "remedy": "",
        "host": begin_record.get("host"),
        "rank": None,
        "error": "",
        "log": "",
        "step": attempts.last_step(folder),
        "saved": next_begin["resumed"],
        "exit": None,
        "attempt": number,
        "ended": next_begin["started"],
        "requeued": True,
        "next": requeue.BY_SLURM,
        **{key: begin_record.get(key) for key in COPIED_FROM_BEGIN},
    }
    write_json(folder / f"attempt-{number}.json", verdict)


def _hold_port(reservation: socket.socket) -> None:
    """Keep the port reserved until the batch script has ended, in whatever way.

    The script reads this process's stdout, so the pipe reports an error or a hang-up once the script is gone.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # 0: report errors and hang-ups only
    poll.poll()
    reservation.close()


def main(arguments: list[str] | None = None) -> int:
    """Run `begin` or `finish`, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.supervise.attempt", description=__doc__)
    parser.add_argument("action", choices=["begin", "finish"])
    parser.add_argument("folder", type=Path, help="the job's folder, RUN/jobs/JOB")
    parser.add_argument("--port", type=int, help="begin: reserve this port as MASTER_PORT; 0 for any free port")
    parser.add_argument("--stop-before", type=float, help="begin: seconds before the time limit at which ranks stop")
    parser.add_argument("--code", type=int, default=0, help="finish: exit code of srun")
    parser.add_argument("--world-size", type=int, default=1, help="finish: number of ranks of the job")
    parser.add_argument("--max-restarts", type=int, help="finish: restarts allowed after a failure (default: none)")
    options = parser.parse_args(arguments)
    if options.action == "finish":
        return _finish_and_requeue(options)
    if _has_completed(options.folder):
        print(
            f"muster: {options.folder.name} has completed, and Slurm started it again: nothing to do", file=sys.stderr
        )
        print("completed", flush=True)
        return 0
    try:
        with slurm.retrying():
            values, reservation = begin(options.folder, options.port)
    except (OSError, ValueError, ConfigError, slurm.SlurmError) as error:
        return _record_failed_begin(options, error)
    if options.stop_before is not None:
        values |= allocation.stop_time(options.stop_before)
    # The batch script reads these lines until `ready` or `completed`; see slurm_templates/setup.sh.j2.
    print("\n".join([*(f"{key}={value}" for key, value in values.items()), "ready"]), flush=True)
    if reservation:
        _hold_port(reservation)
    return 0


def _has_completed(folder: Path) -> bool:
    """Return whether an earlier start of this Slurm job has completed: Slurm requeues some jobs twice, and admins do so."""
    verdict = attempts.last_verdict(folder)
    job_id = slurm_array.own_id(os.environ)
    if verdict is None or verdict["status"] != COMPLETED or job_id is None:
        return False
    same_job = str(verdict.get("job_id")) == job_id and "SLURM_RESTART_COUNT" in os.environ
    return same_job and verdict.get("config") == os.environ.get("MUSTER_CONFIG")


def _finish_and_requeue(options: argparse.Namespace) -> int:
    if not options.folder.exists():
        print(f"muster: {options.folder} was deleted while the job ran: the job has ended", file=sys.stderr, flush=True)
        return 1
    verdict = finish(options.folder, int(os.environ["MUSTER_ATTEMPT"]), options.code, options.world_size)
    if verdict["status"] != COMPLETED and "SLURM_JOB_ID" in os.environ:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        verdict = requeue.decide_and_requeue(options.folder, verdict, options.max_restarts, restarts)
    next_step = f"; {verdict['next']}" if verdict.get("next") else ""
    line = f"muster: {options.folder.name} {verdict['status']} {verdict['reason']}".rstrip() + next_step
    print(visible(line), flush=True)
    return 0 if verdict["status"] == COMPLETED else 1


def _record_failed_begin(options: argparse.Namespace, error: Exception) -> int:
    """Write a verdict for a job that cannot start, as for any other failure. Returns the exit code."""
    folder, port, number = options.folder, options.port, attempts.newest_attempt(options.folder)
    if number is None or (folder / f"attempt-{number}.json").exists():  # the newest is an earlier one
        return _say_unwritable(folder, error)
    status, remedy = classify(error)
    problem = f"{getattr(error, 'strerror', None) or error} on {socket.gethostname()}"
    if isinstance(error, ConfigError):
        status, remedy, problem = USER_ERROR, "", str(error)
    elif port:
        status, remedy = USER_ERROR, ""
        problem = (
            f"cluster.network.master_port={port}: {problem}; set cluster.network.master_port=null to get a free port"
        )
    try:
        record_end(folder, number, 0, status, problem, remedy=remedy)
        verdict = finish(folder, number, 2, 1)
    except OSError as second:  # a full disk, most often
        return _say_unwritable(folder, second)
    print(visible(f"muster: {verdict['reason']}"), file=sys.stderr, flush=True)
    return 2


def _say_unwritable(folder: Path, error: Exception) -> int:
    print(f"muster: {folder}: cannot be written: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
