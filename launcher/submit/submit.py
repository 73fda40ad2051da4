"""Starts the jobs of a run: writes the run folder, then submits a chain of Slurm jobs, or runs the jobs on this machine."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from conf import deepspeed, resolve
from conf.choices import Backend, Executor, Submit
from conf.errors import Problem, RunError, SiteError
from conf.files import PROGRAM, write_json, write_text
from conf.jobs import RESUMABLE
from conf.schema import Config
from conf.visible import visible
from launcher import plan, slurm
from launcher.check import resume
from launcher.paths import CLONE
from launcher.plan import Job
from launcher.run_folder import lock, record
from launcher.status import ownership, state
from launcher.submit import local, preview, render, rewind, sbatch, snapshot
from launcher.supervise import worker


def submit(config: Config, jobs: Sequence[Job], command: Sequence[str]) -> int:
    """Write the run folder and start `jobs`. Returns the exit code.

    On Slurm it returns once the jobs are submitted. On this machine it returns when the last job has ended.
    Raises RunError if the run is already running, and SiteError if Slurm refuses a job (the jobs submitted before it
    are then cancelled).
    """
    if not jobs:
        print(
            f"run       {config.run_dir}\n"
            f"nothing to do: {', '.join(config.jobs)} completed with this configuration before"
        )
        return 0
    with opened(config):
        print(visible(preview.summary(config, jobs, record.training_rows(config))), flush=True)
        return _start(config, jobs, write_run_folder(config, jobs, command))


@contextmanager
def opened(config: Config) -> Iterator[None]:
    """Hold the run folder during the block, which starts jobs of the run. Raises RunError if it cannot be used."""
    run = Path(config.run_dir)
    with lock.held(run):
        stored = resolve.load(run / "config.yaml") if (run / "config.yaml").exists() else None
        if stored:  # another launch may have written it since the checks
            resume.require_same(stored, config)
        if active := state.active_jobs(run):
            remedy = f"is already running: {active}. Wait until it ends, or type muster cancel {run}"
            raise RunError(Problem("run_dir", run, remedy))
        if stored and (made := resume.remove_what_changed(stored, config)):
            print(f"changed   {', '.join(made)} of this run will be made again", flush=True)
        if stored:
            resume.forget_comparison(stored, config)
        yield


def _start(config: Config, jobs: Sequence[Job], config_path: Path) -> int:
    if config.submit is Submit.script:
        print(
            f"\nscripts written; submit all with   bash {config.run_dir}/jobs/submit.sh   "
            f"or one with   sbatch {config.run_dir}/jobs/JOB.sbatch"
        )
    elif not plan.runs_here(config):
        _submit_chain(config, jobs, config_path)
    else:
        return local.run(config, jobs, config_path, partial(record.add_job, Path(config.run_dir)))
    return 0


def write_run_folder(config: Config, jobs: Sequence[Job], command: Sequence[str]) -> Path:
    """Write everything that the jobs read, and return the path of the config.

    Every file is complete or absent, and the config comes first: after an interruption, the same command writes the rest.
    A launch without training does not change RUN/config.yaml. Its own config goes into the folder of its first job.
    Raises RunError if the folder cannot be written.
    """
    run = Path(config.run_dir)
    run_config = run / "config.yaml"
    replaces_config = bool(RESUMABLE.intersection(config.jobs)) or not run_config.exists()
    config_path = run_config if replaces_config else run / "jobs" / jobs[0].name / "config.yaml"
    try:
        rewind.apply(config)
        resolve.save(config, config_path)
        for job in jobs:
            # Without the folder of its log files, srun fails, and may even exit with 0.
            render.job_folder(config, job).mkdir(parents=True, exist_ok=True)
            if config.cluster.executor is Executor.slurm:
                write_text(
                    run / "jobs" / f"{job.name}.sbatch", render.script_text(config, job, config_path), mode=PROGRAM
                )
        if config.cluster.executor is Executor.slurm:
            write_text(run / "jobs" / "submit.sh", render.chain_text(config, jobs), mode=PROGRAM)
        if config.parallel.backend is Backend.zero:
            write_json(run / "deepspeed.json", deepspeed.exported_config(config, config.cluster.train.ranks))
        snapshot.copy_code(CLONE, run)
        where = "local" if plan.runs_here(config) else config.cluster.executor.name
        scripts = [job.name for job in jobs] if config.submit is Submit.script else []
        record.add_launch(run, command, where, snapshot.provenance(CLONE, run), scripts)
    except OSError as error:
        remedy = f"cannot be written: {error.strerror} ({error.filename})"
        raise RunError(Problem("run_dir", config.run_dir, remedy)) from error
    return config_path


def _submit_chain(config: Config, jobs: Sequence[Job], config_path: Path) -> None:
    """Submit the jobs to Slurm, each with its dependencies. Raises SiteError if Slurm refuses one."""
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            ids[job.name] = submit_job(config, job, config_path, [ids[name] for name in job.after])
            print(f"submitted {job.name:<12} {ids[job.name]}", flush=True)
    except slurm.SlurmError as error:
        raise not_submitted(config, job.name, error, ids) from None
    except KeyboardInterrupt:  # half a chain would be of no use
        if cancelled := cancel_submitted(ids):
            print(cancelled.removeprefix("; "), file=sys.stderr, flush=True)
        raise
    print(f"\nwatch with   muster status {config.run_dir}   muster logs {config.run_dir} --follow")


def submit_job(config: Config, job: Job, config_path: Path, dependency: Sequence[str]) -> str:
    """Submit one job and record it. Returns its id. Raises SlurmError."""
    run, parameters = Path(config.run_dir), render.parameters(config, job, dependency)
    name = str(parameters["job_name"])
    # relative to the run, so that a copy of the run folder does not take the job for its own
    folder = str(parameters["additional_parameters"].get("chdir") or Path.cwd()).removeprefix(f"{run}/")
    started, earlier = record.StartedJob("", "slurm", name, folder), record.known_ids(run)
    executor = sbatch.Executor(
        render.job_folder(config, job),
        render.python_command(config, job),
        is_ours=lambda seen: (
            bool(seen.name and seen.folder) and seen.job_id not in earlier and ownership.is_of_run(seen, run, started)
        ),
    )
    executor.update_parameters(**parameters)
    job_id = str(executor.submit(worker.run, job.name, str(config_path)).job_id)
    record.add_job(run, job.name, job_id, name, folder)
    return job_id


def not_submitted(config: Config, what: str, error: slurm.SlurmError, ids: dict[str, str]) -> SiteError:
    """Cancel the jobs that were submitted before Slurm refused `what`, and return the error that says so."""
    why = "did not answer for" if isinstance(error, slurm.BusyError) else "refused"
    return SiteError(Problem("cluster", config.cluster.name, f"Slurm {why} {what}: {error}{cancel_submitted(ids)}"))


def cancel_submitted(ids: dict[str, str]) -> str:
    """Cancel the jobs submitted before one was refused. Returns the result as the end of a message."""
    if not ids:
        return ""
    try:
        slurm.cancel(ids.values())
    except slurm.SlurmError as error:
        return f"; the jobs before it could not be cancelled ({error}): run scancel {' '.join(ids.values())}"
    return f"; cancelled {', '.join(ids)}"
