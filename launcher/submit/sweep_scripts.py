"""Renders the scripts of a sweep: one array for the trainings, and a job for each later step of the best run. Pure."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from conf.schema import Config
from launcher import sbatch_options
from launcher.plan import Job
from launcher.submit import render
from launcher.submit.planned_run import PlannedRun

OF_ONE_RUN = ("job-name", "chdir", "output", "dependency")
"""Options of sbatch that differ between a run and its sweep."""


def job_name(sweep: Path, name: str) -> str:
    """Slurm's name of a job of a sweep."""
    return f"{sweep.name}/{name}"


def directives(config: Config, job: Job) -> list[str]:
    """What a job asks Slurm for, without what names its run."""
    lines = render.sbatch_text(config, job).splitlines()
    names = tuple(f"#SBATCH --{name}=" for name in OF_ONE_RUN)
    return [line for line in lines if line.startswith("#SBATCH") and not line.startswith(names)]


def array_text(sweep: Path, name: str, runs: Sequence[tuple[PlannedRun, Path | None]], dependency: str | None) -> str:
    """The script of an array in which each of `runs` is a task. Beside each: the folder of rows that it takes over."""
    config, job = _first(runs[0][0], name)
    throttle = f"%{config.sweep.at_once}" if config.sweep.at_once else ""
    own = [f"#SBATCH --array=0-{len(runs) - 1}{throttle}", *_of_sweep(sweep, job, "%A_%a", dependency)]
    folders = [(str(run.folder), str(data) if data else "") for run, data in runs]
    return render.template("sweep.sbatch.j2").render(
        name=name, sweep=str(sweep), runs=folders, directives=[*directives(config, job), *own]
    )


def best_run_text(sweep: Path, name: str, first: PlannedRun, dependency: str) -> str:
    """The script of a job of the best run. `first`: a run of the sweep, whose resources it has."""
    config, job = _first(first, name)
    return render.template("sweep.sbatch.j2").render(
        name=name,
        sweep=str(sweep),
        runs=[],
        directives=[*directives(config, job), *_of_sweep(sweep, job, "%j", dependency)],
        **render.values(config, job),
    )


def _first(run: PlannedRun, name: str) -> tuple[Config, Job]:
    job = run.job(name)
    assert job is not None, f"{run.folder} has no job {name}"
    return run.config, job


def _of_sweep(sweep: Path, job: Job, job_id: str, dependency: str | None) -> list[str]:
    """The options that name the sweep. `dependency` comes before the one that the user has given."""
    user = sbatch_options.given(job.resources).get("dependency")
    conditions = ",".join(filter(None, [dependency, user if isinstance(user, str) else None]))
    values = [
        ("job-name", job_name(sweep, job.name)),
        ("chdir", str(sweep)),
        ("output", f"{sweep}/jobs/{job.name}-{job_id}.log"),
        *([("dependency", conditions)] if conditions else []),
    ]
    return [f"#SBATCH --{option}={shlex.quote(value)}" for option, value in values]
