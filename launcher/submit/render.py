"""Renders a job as parameters of submitit and as sbatch text, from the fragments in slurm_templates/. Pure."""

import inspect
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from submitit.core.utils import JobPaths

# Private, but SlurmExecutor.submit itself calls it; tests/launcher/submit/test_render.py compares the texts.
from submitit.slurm.slurm import _make_sbatch_string

from conf import node_paths
from conf.choices import Runtime
from conf.schema import Config
from launcher import containers, sbatch_options, secrets_file
from launcher.environment import job_variables, master_port
from launcher.plan import Job, starts_whole_nodes
from launcher.slurm_command import DEVICES_OF_A_JOB, FINDS_THE_CLUSTER, OF_A_JOB

SUBMITIT_NAMES = frozenset(inspect.signature(_make_sbatch_string).parameters) - {"cpus_per_gpu"}
"""Names of sbatch's options, with `_`, and of submitit's own. Submitit warns about cpus_per_gpu, for its own use of it."""
TEMPLATES = Path(__file__).resolve().parent.parent.parent / "slurm_templates"


def job_folder(config: Config, job: Job) -> Path:
    """Return the folder of a job's logs and attempts, RUN/jobs/JOB."""
    return Path(config.run_dir) / "jobs" / job.name


def parameters(config: Config, job: Job, dependency: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of SlurmExecutor.update_parameters. `dependency`: ids of the jobs that must complete before."""
    part, user = job.resources, sbatch_options.given(job.resources)
    gpus = f"{part.gpu_type}:{part.gpus_per_node}" if part.gpu_type else part.gpus_per_node
    own: dict[str, Any] = {  # names of sbatch's options
        "job-name": f"{config.name}/{job.name}",
        "nodes": part.nodes,
        "ntasks-per-node": part.ranks_per_node,
        "cpus-per-task": part.cpus_per_rank,
        "gpus-per-node": gpus if part.gpus_per_node else None,
        "time": part.time_min,
        "mem": _memory(part.memory_gib),
        "partition": part.partition,
        "qos": part.qos,
        "account": config.cluster.account,
        "constraint": part.constraint,
        "exclude": part.exclude,
        "exclusive": part.exclusive or None,
        "chdir": str(Path(config.run_dir) / "code"),
        "kill-on-invalid-dep": "yes",  # otherwise the jobs after a failed one stay pending for ever
        "requeue" if config.cluster.requeue else "no-requeue": True,
    }
    options = {**own, **dict.fromkeys(sbatch_options.removed(user)), **user}
    options["dependency"] = sbatch_options.dependency(list(dependency), user.get("dependency"))
    given = {name: value for name, value in options.items() if value is not None}
    # submitit writes its own options with `_`. With both spellings in the script, the last line would win.
    submitits = {name for name in given if name.replace("-", "_") in SUBMITIT_NAMES}
    return {
        **{name.replace("-", "_"): given[name] for name in given if name in submitits},
        "wckey": None,  # clusters that track workload keys refuse submitit's default
        "signal_delay_s": config.cluster.signal_s,
        "stderr_to_stdout": True,
        "setup": _fragment("setup", config, job).splitlines(),
        "teardown": _fragment("teardown", config, job).splitlines(),
        "srun_args": _srun_args(config, job),
        "additional_parameters": {name: given[name] for name in given if name not in submitits},
    }


def quoted(words: Sequence[str]) -> str:
    """Return words for a shell."""
    return shlex.join(words)


def _memory(memory_gib: int | None) -> str | None:
    """Return the value of --mem. `0` asks for all memory of the node."""
    if memory_gib is None:
        return None
    return f"{memory_gib}G" if memory_gib else "0"


def python_command(config: Config, job: Job) -> str:
    """Return the shell command of the ranks' Python, inside the container if there is one."""
    python, container = shlex.quote(config.cluster.python or "python3"), config.cluster.container
    if container.image is None or containers.runtime(container) is Runtime.pyxis:
        return python
    words = containers.command(config, _names(config, job), gpus=bool(job.resources.gpus_per_node))
    return " ".join([*words, python])


def _names(config: Config, job: Job) -> list[str]:
    """Return the variables that reach a container, whatever its image sets."""
    from_paths = (need.split(":")[0] for need in containers.variables(config))
    return list(dict.fromkeys([*job_variables(config, job), "PYTHONPATH", *secrets_file.names(config), *from_paths]))


def sbatch_text(config: Config, job: Job, dependency: Sequence[str] = ()) -> str:
    """Return exactly the text that submitit gives to sbatch for this job."""
    folder = job_folder(config, job)
    command = f"{python_command(config, job)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return str(_make_sbatch_string(command=command, folder=folder, **parameters(config, job, dependency)))


def script_text(config: Config, job: Job, config_path: Path) -> str:
    """Return a script to submit by hand with `sbatch`: the same directives, fragments and ranks, without submitit."""
    directives = [line for line in sbatch_text(config, job).splitlines() if line.startswith("#SBATCH")]
    stdout = str(JobPaths(job_folder(config, job)).stdout)
    srun = shlex.join(["srun", "--unbuffered", "--output", stdout, *_srun_args(config, job)])
    command = f"{srun} {python_command(config, job)} -u -m launcher.supervise.worker {job.name} {shlex.quote(str(config_path))}"
    return (
        template("job.sbatch.j2").render(
            name=job.name, run=config.run_dir, directives=directives, command=command, **values(config, job)
        )
        + "\n"
    )


def chain_text(config: Config, jobs: Sequence[Job]) -> str:
    """Return a script that submits the scripts of all jobs with their dependencies."""
    own = {job.name: sbatch_options.given(job.resources).get("dependency") for job in jobs}
    text = template("chain.sh.j2").render(
        run=config.run_dir, jobs=jobs, own=own, keep=FINDS_THE_CLUSTER, of_a_job=OF_A_JOB, devices=DEVICES_OF_A_JOB
    )
    return text + "\n"


def _srun_args(config: Config, job: Job) -> list[str]:
    # If one rank fails, srun ends the others: they would wait for it. A program of the user may end on some ranks long
    # before rank 0 has saved the model.
    return ["--kill-on-bad-exit=1", "--wait=0" if job.name == "custom" else "--wait=60", *config.cluster.srun_args]


def values(config: Config, job: Job) -> dict[str, Any]:
    """Return the variables of the templates."""
    container = config.cluster.container
    return {
        "modules": config.cluster.modules,
        "setup": config.cluster.setup,
        "variables": job_variables(config, job),
        # launcher.supervise.attempt runs outside the container, where only the node's own Python exists
        "python": "python3" if container.image else config.cluster.python or "python3",
        "folder": str(job_folder(config, job)),
        "code": f"{config.run_dir}/code",
        "hf_home": config.cluster.hf_home,
        "made_folders": [containers.cache(config), *filter(None, [config.cluster.hf_home])] if container.image else [],
        "container": containers.srun_words(config, _names(config, job)),
        "port": (master_port(config) or 0) if job.distributed else None,  # 0: any free port
        "world_size": job.world_size,
        # torchrun's ranks have logs of their own, beside those of the nodes
        "log": "node" if starts_whole_nodes(config, job.name) else "rank",
        "signal_s": config.cluster.signal_s,
        "max_restarts": config.cluster.max_restarts if config.cluster.requeue else None,
    }


def _fragment(name: str, config: Config, job: Job) -> str:
    return template(f"{name}.sh.j2").render(**values(config, job))


@cache
def template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    environment.filters["q"] = shlex.quote  # every value goes through it: paths may contain spaces and quotes
    environment.filters["path"] = node_paths.in_shell  # the same for paths whose variables the node expands
    return environment.get_template(name)
