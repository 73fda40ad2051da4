"""Starts the jobs of a run: the only module that submits. Writes the run folder first, then chains on Slurm or runs here."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from conf import deepspeed, resolve
from conf.choices import Backend, Executor, Submit
from conf.errors import Problem, RunError, SiteError
from conf.files import write_json, write_text
from conf.schema import Config
from launcher import slurm
from launcher.paths import CLONE
from launcher.plan import Job
from launcher.run_folder import record
from launcher.status import state
from launcher.submit import local, preview, render, snapshot
from launcher.supervise import worker


def submit(config: Config, jobs: Sequence[Job], command: Sequence[str]) -> int:
    """Write the run folder and start `jobs`; returns the exit code. At once on Slurm; here when the last job has ended.

    Raises RunError when the run is active already, SiteError when Slurm refuses a job (those before it are cancelled).
    """
    if not jobs:
        print(f"run       {config.run_dir}\nnothing to do: {', '.join(config.jobs)} completed before, with this config")
        return 0
    if active := state.active(Path(config.run_dir)):
        raise RunError(
            Problem(
                "run_dir", config.run_dir, f"is at work: {active}; wait, or python -m launcher cancel {config.run_dir}"
            )
        )
    print(preview.summary(config, jobs), flush=True)
    config_path = write_run(config, jobs, command)
    if config.submit is Submit.script:
        print(
            f"\nwritten; submit with   bash {config.run_dir}/jobs/submit.sh   or each with sbatch {config.run_dir}/jobs/JOB.sbatch"
        )
    elif config.cluster.executor is Executor.slurm:
        _chain(config, jobs, config_path)
    else:
        return local.run(config, jobs, config_path, partial(record.add_job, Path(config.run_dir)))
    return 0


def write_run(config: Config, jobs: Sequence[Job], command: Sequence[str]) -> Path:
    """Everything the jobs read, each file whole or absent. The config comes first: whatever else is missing,
    the same command given again writes it.

    A launch that does not train leaves the run's own config as it is, and keeps its config beside the job.
    Raises RunError when the folder cannot be written.
    """
    run = Path(config.run_dir)
    own = run / "config.yaml"
    config_path = own if not own.exists() or "train" in config.jobs else run / "jobs" / jobs[0].name / "config.yaml"
    try:
        resolve.save(config, config_path)
        for job in jobs:
            # srun fails, and may exit 0 for all that, where the folder of its logs is missing
            render.job_folder(config, job).mkdir(parents=True, exist_ok=True)
            if config.cluster.executor is Executor.slurm:
                write_text(
                    run / "jobs" / f"{job.name}.sbatch", render.script_text(config, job, config_path), mode=0o700
                )
        if config.cluster.executor is Executor.slurm:
            write_text(run / "jobs" / "submit.sh", render.chain_text(config, jobs), mode=0o700)
        if config.parallel.backend is Backend.zero:
            part = config.cluster.train
            write_json(run / "deepspeed.json", deepspeed.deepspeed_config(config, part.nodes * part.ranks_per_node))
        snapshot.take(CLONE, run)
        record.add_launch(run, command, config.cluster.executor.name, snapshot.provenance(CLONE, run))
    except OSError as error:
        raise RunError(
            Problem("run_dir", config.run_dir, f"cannot be written: {error.strerror} ({error.filename})")
        ) from error
    return config_path


def _chain(config: Config, jobs: Sequence[Job], config_path: Path) -> None:
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            executor = SlurmExecutor(render.job_folder(config, job), python=render.python_command(config))
            executor.update_parameters(**render.parameters(config, job, [ids[name] for name in job.after]))
            ids[job.name] = executor.submit(worker.run, job.name, str(config_path)).job_id
            record.add_job(Path(config.run_dir), job.name, ids[job.name])
            print(f"submitted {job.name:<12} {ids[job.name]}", flush=True)
    except (FailedJobError, FailedSubmissionError) as error:
        undone = _undo(ids)
        said = next((line.strip() for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
        raise SiteError(
            Problem(
                "cluster",
                config.cluster.name,
                f"Slurm refused {job.name}: {said}{undone}",
            )
        ) from None
    print(f"\nwatch with   make status RUN={config.run_dir}   make logs RUN={config.run_dir}")


def _undo(ids: dict[str, str]) -> str:
    """Cancel the jobs submitted before one was refused; says what became of them."""
    if not ids:
        return ""
    try:
        slurm.cancel(ids.values())
    except slurm.SlurmError as error:
        return f"; cancel these by hand: {' '.join(ids.values())} ({error})"
    return f"; cancelled {', '.join(ids)}"
