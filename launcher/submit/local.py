"""Runs a run's jobs on this machine, one after the other through submitit's local executor, and shows what rank 0 prints."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from submitit import LocalExecutor

from conf.errors import Problem, SiteError
from conf.schema import Config
from launcher import environment
from launcher.plan import Job
from launcher.run_folder.status import COMPLETED
from launcher.status import tables
from launcher.submit import render
from launcher.supervise import attempt, worker

PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank \d+ ([A-Z]+) ")
"""What jobs/distributed/logs.py puts before every line of a rank's log: the terminal does without."""
GRACE_S = 15
"""How long the other ranks of a failed job may go on; nothing else ends ranks that wait for a dead one."""


def run(config: Config, jobs: Sequence[Job], config_path: Path, note: Callable[[str, str], None]) -> int:
    """Run the jobs in order, telling `note` each name and id; a failed one ends the run. Returns the command's exit code."""
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # end it as Ctrl-C does: ranks have sessions of their own, and would go on
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, signal.default_int_handler)
    for job in jobs:
        verdict = _run_job(config, job, config_path, note)
        if verdict["status"] != COMPLETED:
            where = "" if verdict["rank"] is None else f" (rank {verdict['rank']})"
            print(
                f"\n{job.name} {verdict['status']}{where}: {verdict['reason']}\nlogs      {render.job_folder(config, job)}\n"
                f"go on     python launch.py resume={config.run_dir}",
                file=sys.stderr,
            )
            return 2 if verdict["status"] == "user_error" else 1
    tables.show(Path(config.run_dir))
    return 0


def _run_job(config: Config, job: Job, config_path: Path, note: Callable[[str, str], None]) -> dict[str, Any]:
    folder, part = render.job_folder(config, job), job.resources
    print(f"\n==== {job.name}", flush=True)
    here = {"PYTHONPATH": environment.python_path(config, os.environ), "SUBMITIT_EXECUTOR": "local"}
    with environment.applied(environment.job_variables(config, job) | here):
        port = config.cluster.network.master_port
        try:
            opened, held = attempt.begin(folder, (port or 0) if job.distributed else None)
        except OSError as error:
            remedy = f"{error.strerror}: leave it null, so that a free one is found"
            raise SiteError(Problem("cluster.network.master_port", port, remedy)) from error
        executor = LocalExecutor(folder, python=render.python_command(config))
        executor.update_parameters(
            tasks_per_node=part.ranks_per_node,
            timeout_min=part.time_min,
            stderr_to_stdout=True,
            signal_delay_s=config.cluster.signal_s,
            **_gpus(part.gpus_per_node or 0),
        )
        with environment.applied(opened), _interruptible():
            started = executor.submit(worker.run, job.name, str(config_path))
        note(job.name, started.job_id)
        number = int(opened["MUSTER_ATTEMPT"])
        try:
            _follow(started, folder / f"attempt-{number}", show=sys.stdout)
        finally:
            code = _end(started)
            if held:
                held.close()
        return attempt.finish(folder, number, code, job.world_size)


@contextmanager
def _interruptible() -> Iterator[None]:
    """What is started meanwhile can be ended by SIGINT, also where a shell began launch.py in the background, which ignores it."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _gpus(count: int) -> dict[str, Any]:
    """Of the GPUs this process may see, the first `count`; submitit would count from 0."""
    visible = [int(item) for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip().isdigit()]
    return {"gpus_per_node": count, **({"visible_gpus": visible} if visible and count else {})}


def _follow(job: Any, folder: Path, show: IO[str]) -> None:
    """Copy rank 0's log to `show` until the job has ended; end the job once a rank has failed and the others go on."""
    log, position, begun, failed_at = Path(job.paths.stdout), 0, "", None
    while True:
        ended = job.done()
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            *lines, begun = (begun + text).split("\n")
            for line in lines + [begun] * ended:
                said = PREFIX.sub(lambda found: "" if found[1] == "INFO" else f"{found[1].lower():<9} ", line, count=1)
                if not said.startswith(("submitit ", "environment {")):
                    print(said, file=show, flush=True)
        if ended:
            return
        if failed_at is None and any(folder.glob("rank-*.json")):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            return
        time.sleep(0.2)


def _end(job: Any) -> int:
    """Exit code of the job's ranks: 0 when all ended by themselves with 0."""
    process = job._process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait()
        return 143
    return 0 if all(path.exists() for path in (sub.paths.result_pickle for sub in job._sub_jobs or [job])) else 1
