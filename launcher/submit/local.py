"""Runs the jobs of a run on this machine, one after the other with submitit's local executor, and shows rank 0's log."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conf.errors import Problem, SiteError
from conf.files import write_text
from conf.jobs import JOB_KINDS
from conf.schema import Config
from conf.visible import visible
from launcher import environment
from launcher.check import resume
from launcher.plan import Job
from launcher.run_folder import sweep_record
from launcher.run_folder.status import COMPLETED, PLANNED, STOPPED, USER_ERROR
from launcher.status import tables
from launcher.submit import display, interrupts, local_executor, render
from launcher.submit.activity import Activity
from launcher.submit.display import Plain
from launcher.submit.follow_log import Log
from launcher.submit.interrupts import Interrupts
from launcher.supervise import attempt, worker


def run(config: Config, jobs: Sequence[Job], config_path: Path, on_start: Callable[[str, str], None]) -> int:
    """Run the jobs in order until one fails. Returns the exit code of the command.

    Ctrl-C, SIGTERM and the end of the terminal let training save and end; a second Ctrl-C ends it at once.
    Calls `on_start` with name and id of each job that has started. Raises SiteError if MASTER_PORT is in use.
    """
    with interrupts.noticed() as requests:
        shown = display.of([job.name for job in jobs], requests)
        try:
            code = _run_all(config, jobs, config_path, on_start, shown, requests)
        finally:
            shown.close()
    if code == 0:
        tables.show_result(Path(config.run_dir))
    return code


def _run_all(
    config: Config,
    jobs: Sequence[Job],
    config_path: Path,
    on_start: Callable[[str, str], None],
    shown: Plain,
    requests: Interrupts,
) -> int:
    """Run the jobs, and say how to go on where one has not completed. Returns the exit code of the command."""
    for job in jobs:
        if requests.first:
            _say_how_to_resume(config, job, shown, f"stopped by {requests.name} before {job.name}")
            return requests.exit_code
        if job.name in sweep_record.cancelled(Path(config.run_dir).parent):
            _say_how_to_resume(config, job, shown, f"{job.name}: cancelled by muster cancel")
            return 1
        verdict = _run_job(config, job, config_path, on_start, shown, requests)
        shown.end(verdict["status"])
        if verdict["status"] != COMPLETED:
            where = "" if verdict["rank"] is None else f" (rank {verdict['rank']})"
            how = "" if verdict["status"] == STOPPED else f" {verdict['status']}{where}"
            _say_how_to_resume(config, job, shown, f"{job.name}{how}: {verdict['reason']}", verdict["status"])
            return requests.exit_code or (2 if verdict["status"] == USER_ERROR else 1)
    return 0


def _say_how_to_resume(config: Config, job: Job, shown: Plain, why: str, status: str = STOPPED) -> None:
    """Print how a run ended before its last job had completed, and the command that continues it."""
    note = ""
    if status == USER_ERROR:
        note = " (once the cause is removed, with other KEY=VALUE if they are the cause)"
        if resume.has_trained(Path(config.run_dir)):
            note = " (once the cause is removed; keys of what it computes need a new run)"
    command = f"muster {'push' if job.name == 'push' else 'resume'} {shlex.quote(config.run_dir)}"
    shown.note(visible(f"\n{why}"), "yellow" if status in PLANNED else "red")
    shown.note(visible(f"logs      {render.job_folder(config, job)}\nresume    {command}{note}"))


def _run_job(
    config: Config,
    job: Job,
    config_path: Path,
    on_start: Callable[[str, str], None],
    shown: Plain,
    requests: Interrupts,
) -> dict[str, Any]:
    """Run one attempt of a job as the batch script does on Slurm. Returns its verdict."""
    folder = render.job_folder(config, job)
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
        number = int(attempt_values["MUSTER_ATTEMPT"])
        log_of_controller = folder / f"attempt-{number}" / "controller.log"
        python = render.python_command(config, job)
        executor = local_executor.Executor(folder, python, job, log_of_controller, config.cluster.signal_s)
        with environment.temporary_variables(attempt_values):
            started = executor.submit(worker.run, job.name, str(config_path))
        on_start(job.name, started.job_id)
        log = Log(started, folder / f"attempt-{number}", shown)
        steps, memory_gib = config.train.steps, config.cluster.train.gpu_memory_gib
        shown.begin(Activity(Path(config.run_dir), job.name, log.attempt, steps, memory_gib))
        try:
            _wait(job, number, log, shown, requests)
        finally:
            code = local_executor.end(started)
            if reservation:
                reservation.close()
        verdict = attempt.finish(folder, number, code, job.world_size)
        for line in log.errors:
            if line not in verdict["reason"].splitlines():  # `run` prints the reason
                shown.note(visible(f"error     {line}"), "red")
        return verdict


def _wait(job: Job, number: int, log: Log, shown: Plain, requests: Interrupts) -> None:
    """Show the log until the job has ended, and pass on requests to stop. Ranks that still run at the return are to be ended."""
    is_told = False
    while log.show_more():
        if requests.again or (requests.first and not JOB_KINDS[job.name].resumable):
            _record_end_without_saving(log.attempt, number, requests)
            return
        if requests.first and not is_told:
            is_told = True
            write_text(log.attempt.parent / "stop", f"stopped by {requests.name}")
            text = (
                f"\nstopping  {job.name} saves at its next step, then ends. Press Ctrl-C again to end it without saving"
            )
            shown.note(text, "yellow")


def _record_end_without_saving(folder: Path, number: int, requests: Interrupts) -> None:
    """Record in the folder of an attempt that its ranks are ended on request; not if one has recorded another end."""
    if not any(folder.glob("rank-*.json")):
        again = "a second " if requests.again else ""
        attempt.record_end(folder.parent, number, 0, STOPPED, f"ended by {again}{requests.name}, without saving")
