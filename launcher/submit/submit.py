"""Starts the jobs of a run: writes the run folder, then submits a chain of Slurm jobs, or runs the jobs on this machine."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from conf import deepspeed, resolve
from conf.choices import Backend, Executor, Submit
from conf.errors import Problem, RunError, SiteError
from conf.files import write_json, write_text
from conf.jobs import RESUMABLE
from conf.schema import Config
from launcher import slurm
from launcher.paths import CLONE
from launcher.plan import Job
from launcher.run_folder import record
from launcher.status import state
from launcher.submit import local, preview, render, snapshot
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
    if active := state.active_jobs(Path(config.run_dir)):
        remedy = f"is already running: {active}. Wait until it ends, or type muster cancel {config.run_dir}"
        raise RunError(Problem("run_dir", config.run_dir, remedy))
    print(preview.summary(config, jobs), flush=True)
    config_path = write_run_folder(config, jobs, command)
    if config.submit is Submit.script:
        print(
            f"\nscripts written; submit all with   bash {config.run_dir}/jobs/submit.sh   "
            f"or one with   sbatch {config.run_dir}/jobs/JOB.sbatch"
        )
    elif config.cluster.executor is Executor.slurm:
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
        resolve.save(config, config_path)
        for job in jobs:
            # Without the folder of its log files, srun fails, and may even exit with 0.
            render.job_folder(config, job).mkdir(parents=True, exist_ok=True)
            if config.cluster.executor is Executor.slurm:
                write_text(
                    run / "jobs" / f"{job.name}.sbatch", render.script_text(config, job, config_path), mode=0o700
                )
        if config.cluster.executor is Executor.slurm:
            write_text(run / "jobs" / "submit.sh", render.chain_text(config, jobs), mode=0o700)
        if config.parallel.backend is Backend.zero:
            train = config.cluster.train
            write_json(run / "deepspeed.json", deepspeed.exported_config(config, train.nodes * train.ranks_per_node))
        snapshot.copy_code(CLONE, run)
        record.add_launch(run, command, config.cluster.executor.name, snapshot.provenance(CLONE, run))
    except OSError as error:
        remedy = f"cannot be written: {error.strerror} ({error.filename})"
        raise RunError(Problem("run_dir", config.run_dir, remedy)) from error
    return config_path


def _submit_chain(config: Config, jobs: Sequence[Job], config_path: Path) -> None:
    """Submit the jobs to Slurm, each with its dependencies. Raises SiteError if Slurm refuses one."""
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            executor = SlurmExecutor(render.job_folder(config, job), python=render.python_command(config))
            executor.update_parameters(**render.parameters(config, job, [ids[name] for name in job.after]))
            ids[job.name] = executor.submit(worker.run, job.name, str(config_path)).job_id
            record.add_job(Path(config.run_dir), job.name, ids[job.name])
            print(f"submitted {job.name:<12} {ids[job.name]}", flush=True)
    except (FailedJobError, FailedSubmissionError) as error:
        cancelled = _cancel_submitted(ids)
        lines = str(error).splitlines()
        message = next((line.strip() for line in lines if "error:" in line), lines[0])
        remedy = f"Slurm refused {job.name}: {message}{cancelled}"
        raise SiteError(Problem("cluster", config.cluster.name, remedy)) from None
    print(f"\nwatch with   muster status {config.run_dir}   muster logs {config.run_dir} --follow")


def _cancel_submitted(ids: dict[str, str]) -> str:
    """Cancel the jobs submitted before one was refused. Returns the result as the end of a message."""
    if not ids:
        return ""
    try:
        slurm.cancel(ids.values())
    except slurm.SlurmError as error:
        return f"; the jobs before it could not be cancelled ({error}): run scancel {' '.join(ids.values())}"
    return f"; cancelled {', '.join(ids)}"
