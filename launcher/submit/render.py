"""Renders a Job as submitit parameters and as sbatch text, from the fragments in slurm_templates/; pure."""

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from submitit.core.utils import JobPaths
from submitit.slurm.slurm import (
    _make_sbatch_string,
)  # private: what SlurmExecutor.submit itself calls; test_render pins it

from conf.choices import Container
from conf.schema import Config
from launcher.environment import job_variables
from launcher.plan import Job

TEMPLATES = Path(__file__).resolve().parent.parent.parent / "slurm_templates"


def job_folder(config: Config, job: Job) -> Path:
    """Where a job's script, logs and attempts stand."""
    return Path(config.run_dir) / "jobs" / job.name


def parameters(config: Config, job: Job, dependency: Sequence[str] = ()) -> dict[str, Any]:
    """What SlurmExecutor.update_parameters is given; `dependency` are the ids of the jobs that must end well before."""
    part = job.resources
    gpus = f"{part.gpu_type}:{part.gpus_per_node}" if part.gpu_type else part.gpus_per_node
    named: dict[str, Any] = {
        "job_name": f"{config.name}/{job.name}",
        "nodes": part.nodes,
        "ntasks_per_node": part.ranks_per_node,
        "cpus_per_task": part.cpus_per_rank,
        "gpus_per_node": gpus if part.gpus_per_node else None,
        "time": part.time_min,
        "mem": None if part.memory_gib is None else f"{part.memory_gib}G" if part.memory_gib else "0",
        "partition": part.partition,
        "qos": part.qos,
        "account": config.cluster.account,
        "constraint": part.constraint,
        "exclude": part.exclude,
        "exclusive": part.exclusive or None,
        "dependency": "afterok:" + ":".join(dependency) if dependency else None,
    }
    extra: dict[str, Any] = {
        "chdir": str(Path(config.run_dir) / "code"),
        "kill-on-invalid-dep": "yes",  # else a failed parent leaves its dependants pending for ever
        "requeue" if config.cluster.requeue else "no-requeue": True,
    }
    for (
        key,
        value,
    ) in part.sbatch.items():  # submitit spells its own with _, and of two spellings the last line would win
        where, name = (named, key.replace("-", "_")) if key.replace("-", "_") in named else (extra, key)
        where[name] = value
    return {
        **{key: value for key, value in named.items() if value is not None},
        "wckey": None,  # submitit's default is refused on clusters that track workload keys
        "signal_delay_s": config.cluster.signal_s,
        "stderr_to_stdout": True,
        "setup": _fragment("setup", config, job).splitlines(),
        "teardown": _fragment("teardown", config, job).splitlines(),
        "srun_args": _srun_args(config, job),
        "additional_parameters": {key: value for key, value in extra.items() if value is not None},
    }


def python_command(config: Config) -> str:
    """The interpreter of the ranks as a shell command, inside the container where there is one."""
    python = shlex.quote(config.cluster.python or "python3")
    if config.cluster.container is Container.apptainer:
        binds = ",".join([config.run_dir, *config.cluster.container_mounts])
        return f"apptainer exec --nv --bind {shlex.quote(binds)} {shlex.quote(str(config.cluster.container_image))} {python}"
    return python


def sbatch_text(config: Config, job: Job, dependency: Sequence[str] = ()) -> str:
    """The very text that submitit gives to sbatch for this job."""
    folder = job_folder(config, job)
    command = f"{python_command(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters(config, job, dependency)))


def script_text(config: Config, job: Job, config_path: Path) -> str:
    """A whole script for `sbatch` by hand: the same directives, fragments and ranks, without submitit."""
    directives = [line for line in sbatch_text(config, job).splitlines() if line.startswith("#SBATCH")]
    stdout = str(JobPaths(job_folder(config, job)).stdout)
    srun = shlex.join(["srun", "--unbuffered", "--output", stdout, *_srun_args(config, job)])
    command = (
        f"{srun} {python_command(config)} -u -m launcher.supervise.worker {job.name} {shlex.quote(str(config_path))}"
    )
    return (
        _template("job.sbatch.j2").render(
            name=job.name, run=config.run_dir, directives=directives, command=command, **_values(config, job)
        )
        + "\n"
    )


def chain_text(config: Config, jobs: Sequence[Job]) -> str:
    """A script that submits the scripts of all jobs with their dependencies."""
    return _template("chain.sh.j2").render(run=config.run_dir, jobs=jobs) + "\n"


def _srun_args(config: Config, job: Job) -> list[str]:
    arguments = ["--kill-on-bad-exit=1", "--wait=60"]
    if config.cluster.container is Container.pyxis:
        mounts = ",".join(
            f"{path}:{path}" if ":" not in path else path for path in [config.run_dir, *config.cluster.container_mounts]
        )
        arguments += [
            f"--container-image={config.cluster.container_image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={config.run_dir}/code",
        ]
    return [*arguments, *config.cluster.srun_args]


def _values(config: Config, job: Job) -> dict[str, Any]:
    """What the fragments may name."""
    inside = config.cluster.container is not Container.none
    port = None
    if job.distributed:
        port = config.cluster.network.master_port or 0
    return {
        "modules": config.cluster.modules,
        "setup": config.cluster.setup,
        "variables": job_variables(config, job),
        "python": "python3" if inside else config.cluster.python or "python3",
        "folder": str(job_folder(config, job)),
        "code": f"{config.run_dir}/code",
        "port": port,
        "world_size": job.world_size,
        "signal_s": config.cluster.signal_s,
        "max_restarts": config.cluster.max_restarts if config.cluster.requeue else None,
    }


def _fragment(name: str, config: Config, job: Job) -> str:
    return _template(f"{name}.sh.j2").render(**_values(config, job))


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    environment.filters["q"] = shlex.quote
    return environment.get_template(name)
