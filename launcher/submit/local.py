"""Runs the jobs of a run on this machine, one after the other with submitit's local executor, and shows rank 0's log."""

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
from conf.visible import visible
from launcher import environment
from launcher.check import resume
from launcher.plan import Job
from launcher.run_folder.log_lines import LOG_PREFIX
from launcher.run_folder.status import COMPLETED, USER_ERROR
from launcher.status import tables
from launcher.submit import render
from launcher.supervise import attempt, worker

GRACE_S = 15
"""How long the other ranks may continue after one has failed. Without this, ranks that wait for a dead one never end."""


def run(config: Config, jobs: Sequence[Job], config_path: Path, on_start: Callable[[str, str], None]) -> int:
    """Run the jobs in order until one fails. Returns the exit code of the command.

    Calls `on_start` with name and id of each job that has started. Raises SiteError if MASTER_PORT is in use.
    """
    # End on these signals as on Ctrl-C: the ranks have their own sessions, and would go on after a plain exit.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup, SIGHUP is ignored and must stay so
            signal.signal(number, signal.default_int_handler)
    for job in jobs:
        verdict = _run_job(config, job, config_path, on_start)
        if verdict["status"] != COMPLETED:
            where = "" if verdict["rank"] is None else f" (rank {verdict['rank']})"
            note = ""
            if verdict["status"] == USER_ERROR:
                note = " (once the cause is removed, with other KEY=VALUE if they are the cause)"
                if resume.has_trained(Path(config.run_dir)):
                    note = " (once the cause is removed; keys of what it computes need a new run)"
            text = (
                f"\n{job.name} {verdict['status']}{where}: {verdict['reason']}\nlogs      {render.job_folder(config, job)}\n"
                f"resume    muster {'push' if job.name == 'push' else 'resume'} {config.run_dir}{note}"
            )
            print(visible(text), file=sys.stderr)
            return 2 if verdict["status"] == USER_ERROR else 1
    tables.show_result(Path(config.run_dir))
    return 0


def _run_job(config: Config, job: Job, config_path: Path, on_start: Callable[[str, str], None]) -> dict[str, Any]:
    """Run one attempt of a job as the batch script does on Slurm. Returns its verdict."""
    folder, part = render.job_folder(config, job), job.resources
    print(f"\n==== {job.name}", flush=True)
    local_values = {"PYTHONPATH": environment.python_path(config, os.environ), "SUBMITIT_EXECUTOR": "local"}
    with environment.temporary_variables(environment.job_variables(config, job) | local_values):
        port = environment.master_port(config)
        try:
            attempt_values, reservation = attempt.begin(folder, (port or 0) if job.distributed else None)
        except OSError as error:
            if port is None:  # it is not the port
                raise SiteError(Problem("run_dir", config.run_dir, f"{job.name} cannot start: {error}")) from error
            remedy = f"{error.strerror}; set cluster.network.master_port=null to get a free port"
            raise SiteError(Problem("cluster.network.master_port", port, remedy)) from error
        executor = LocalExecutor(folder, python=render.python_command(config, job))
        executor.update_parameters(
            tasks_per_node=part.ranks_per_node,
            timeout_min=part.time_min,
            stderr_to_stdout=True,
            signal_delay_s=config.cluster.signal_s,
            **_gpu_parameters(part.gpus_per_node or 0),
        )
        with environment.temporary_variables(attempt_values), _interruptible():
            started = executor.submit(worker.run, job.name, str(config_path))
        on_start(job.name, started.job_id)
        number = int(attempt_values["MUSTER_ATTEMPT"])
        errors: list[str] = []
        try:
            _follow_log(started, folder / f"attempt-{number}", output=sys.stdout, errors=errors)
        finally:
            code = _end_ranks(started)
            if reservation:
                reservation.close()
        verdict = attempt.finish(folder, number, code, job.world_size)
        for line in errors:
            if line not in verdict["reason"].splitlines():  # `run` prints the reason
                print(visible(f"error     {line}"), flush=True)
        return verdict


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let processes that are started in the block react to SIGINT.

    A shell that starts launch.py in the background makes it ignore SIGINT, and its children would inherit that.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _gpu_parameters(count: int) -> dict[str, Any]:
    """Return submitit's parameters for the first `count` GPUs that this process may see; submitit would count from 0."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [int(device) for device in devices if device.strip().isdigit()]
    return {"gpus_per_node": count, **({"visible_gpus": visible} if visible and count else {})}


def _follow_log(job: Any, folder: Path, output: IO[str], errors: list[str]) -> None:
    """Copy rank 0's log to `output` until the job has ended, or until GRACE_S after a rank has failed.

    `folder` is the attempt's folder, where a rank that has failed leaves its record. Lines of level ERROR are added to
    `errors` instead: the last one is the reason that the attempt gives for its end, which must not be printed twice.
    """
    log, position, unfinished_line, failed_at = Path(job.paths.stdout), 0, "", None
    while True:
        ended = job.done()  # before reading, so that the last lines are read after the end
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            *lines, unfinished_line = (unfinished_line + text).split("\n")
            _print_lines([*lines, unfinished_line] if ended else lines, output, errors)
        if ended:
            return
        if failed_at is None and any(folder.glob("rank-*.json")):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            return
        time.sleep(0.2)


def _print_lines(lines: Sequence[str], output: IO[str], errors: list[str]) -> None:
    """Print log lines without their prefix, but with a level other than INFO.

    Leaves out submitit's own lines and the environment, and collects errors.
    """
    for line in lines:
        prefix = LOG_PREFIX.match(line)
        if prefix and prefix[1] == "ERROR":
            errors.append(line[prefix.end() :])
            continue
        message = LOG_PREFIX.sub(_level_prefix, line, count=1)
        if not message.startswith(("submitit ", "environment {")):
            print(visible(message), file=output, flush=True)


def _level_prefix(match: re.Match[str]) -> str:
    level = match[1]
    return "" if level == "INFO" else f"{level.lower():<9} "


def _end_ranks(job: Any) -> int:
    """End ranks that still run. Returns the exit code of the job: 0 if all ranks ended by themselves with 0."""
    process = job._process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait()
        return 143
    # submitit writes a rank's result file only if its function has returned
    tasks = job._sub_jobs or [job]
    return 0 if all(task.paths.result_pickle.exists() for task in tasks) else 1
