"""Renders a job as parameters of submitit and as sbatch text, from the fragments in slurm_templates/. Pure."""

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from submitit.core.utils import JobPaths

# Private, but SlurmExecutor.submit itself calls it; tests/launcher/submit/test_render.py compares the texts.
from submitit.slurm.slurm import _make_sbatch_string

from conf.choices import Container, ProgramLauncher
from conf.schema import Config
from launcher.environment import job_variables
from launcher.plan import Job

TEMPLATES = Path(__file__).resolve().parent.parent.parent / "slurm_templates"


def job_folder(config: Config, job: Job) -> Path:
    """Return the folder of a job's logs and attempts, RUN/jobs/JOB."""
    return Path(config.run_dir) / "jobs" / job.name


def parameters(config: Config, job: Job, dependency: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of SlurmExecutor.update_parameters. `dependency`: ids of the jobs that must complete before."""
    part = job.resources
    gpus = f"{part.gpu_type}:{part.gpus_per_node}" if part.gpu_type else part.gpus_per_node
    known: dict[str, Any] = {  # names of submitit's own parameters
        "job_name": f"{config.name}/{job.name}",
        "nodes": part.nodes,
        "ntasks_per_node": part.ranks_per_node,
        "cpus_per_task": part.cpus_per_rank,
        "gpus_per_node": gpus if part.gpus_per_node else None,
        "time": part.time_min,
        "mem": _memory(part.memory_gib),
        "partition": part.partition,
        "qos": part.qos,
        "account": config.cluster.account,
        "constraint": part.constraint,
        "exclude": part.exclude,
        "exclusive": part.exclusive or None,
        "dependency": "afterok:" + ":".join(dependency) if dependency else None,
    }
    additional: dict[str, Any] = {  # names of sbatch's options
        "chdir": str(Path(config.run_dir) / "code"),
        "kill-on-invalid-dep": "yes",  # otherwise the jobs after a failed one stay pending for ever
        "requeue" if config.cluster.requeue else "no-requeue": True,
    }
    for option, value in part.sbatch.items():
        # submitit writes its own options with `_`. With both spellings in the script, the last line would win.
        name = option.replace("-", "_")
        if name in known:
            known[name] = value
        else:
            additional[option] = value
    return {
        **{name: value for name, value in known.items() if value is not None},
        "wckey": None,  # clusters that track workload keys refuse submitit's default
        "signal_delay_s": config.cluster.signal_s,
        "stderr_to_stdout": True,
        "setup": _fragment("setup", config, job).splitlines(),
        "teardown": _fragment("teardown", config, job).splitlines(),
        "srun_args": _srun_args(config, job),
        "additional_parameters": {option: value for option, value in additional.items() if value is not None},
    }


def _memory(memory_gib: int | None) -> str | None:
    """Return the value of --mem. `0` asks for all memory of the node."""
    if memory_gib is None:
        return None
    return f"{memory_gib}G" if memory_gib else "0"


def python_command(config: Config) -> str:
    """Return the shell command of the ranks' Python, inside the container if there is one."""
    python = shlex.quote(config.cluster.python or "python3")
    if config.cluster.container is Container.apptainer:
        binds = ",".join([config.run_dir, *config.cluster.container_mounts])
        return f"apptainer exec --nv --bind {shlex.quote(binds)} {shlex.quote(str(config.cluster.container_image))} {python}"
    return python


def sbatch_text(config: Config, job: Job, dependency: Sequence[str] = ()) -> str:
    """Return exactly the text that submitit gives to sbatch for this job."""
    folder = job_folder(config, job)
    command = f"{python_command(config)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters(config, job, dependency)))


def script_text(config: Config, job: Job, config_path: Path) -> str:
    """Return a script to submit by hand with `sbatch`: the same directives, fragments and ranks, without submitit."""
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
    """Return a script that submits the scripts of all jobs with their dependencies."""
    return _template("chain.sh.j2").render(run=config.run_dir, jobs=jobs) + "\n"


def _srun_args(config: Config, job: Job) -> list[str]:
    # If one rank fails, srun ends the others: they would wait for it. A program of the user may end on some ranks long
    # before rank 0 has saved the model.
    arguments = ["--kill-on-bad-exit=1", "--wait=0" if job.name == "custom" else "--wait=60"]
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
    """Return the variables of the templates."""
    in_container = config.cluster.container is not Container.none
    return {
        "modules": config.cluster.modules,
        "setup": config.cluster.setup,
        "variables": job_variables(config, job),
        # launcher.supervise.attempt runs outside the container, where only the node's own Python exists
        "python": "python3" if in_container else config.cluster.python or "python3",
        "folder": str(job_folder(config, job)),
        "code": f"{config.run_dir}/code",
        "port": (config.cluster.network.master_port or 0) if job.distributed else None,  # 0: any free port
        "world_size": job.world_size,
        # torchrun's ranks have logs of their own, beside those of the nodes
        "log": "node" if job.name == "custom" and config.custom.launcher is not ProgramLauncher.srun else "rank",
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
    environment.filters["q"] = shlex.quote  # every value goes through it: paths may contain spaces and quotes
    return environment.get_template(name)
