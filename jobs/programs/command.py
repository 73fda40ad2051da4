"""Builds the command line that starts the user's program on one node or rank. Pure."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from string import Template

from conf.choices import ProgramLauncher
from conf.schema import Config

PYTHONS = ("python", "python3")
ACCELERATE_FILE = "accelerate.json"
LOG_PREFIX = "muster-rank-"
"""torchrun writes it and the rank before every line, so that `output.Output` can sort the lines into one log per rank."""


@dataclass(frozen=True)
class Place:
    """The place of one task of Slurm in its job, as torch.distributed would say it."""

    task: int
    """Number of the task: the rank with `custom.launcher=srun`, the node otherwise."""
    tasks: int
    address: str
    """MASTER_ADDR."""
    port: str
    """MASTER_PORT."""


def words(config: Config, place: Place, python: str, variables: Mapping[str, str]) -> list[str]:
    """Return the words of the command that this task runs. `python` stands for `python` in the user's command.

    Variables in a word become their values; a variable that is not set stays as it is.
    """
    given = [Template(word).safe_substitute(variables) for word in shlex.split(str(config.custom.command))]
    if config.custom.launcher is ProgramLauncher.srun:
        if given[0] in PYTHONS:
            return [python, *given[1:]]
        return [python, *given] if given[0].endswith(".py") else given
    interpreter, rest = split_python(given, python)
    ranks, local = config.cluster.train.ranks_per_node, variables["MUSTER_LOCAL"]
    if config.custom.launcher is ProgramLauncher.accelerate:
        return [
            interpreter, "-m", "accelerate.commands.launch", f"--config_file={local}/{ACCELERATE_FILE}",
            f"--num_machines={place.tasks}", f"--machine_rank={place.task}", f"--num_processes={place.tasks * ranks}",
            f"--main_process_ip={place.address}", f"--main_process_port={place.port}", "--same_network",
            "--rdzv_backend=static", "--deepspeed_multinode_launcher=standard", "--tee=3", f"--log_dir={local}/torchrun", *rest,
        ]  # fmt: skip
    if config.custom.launcher is ProgramLauncher.ray:
        resources = config.cluster.train
        return [
            interpreter, "-m", "muster.ray_node", f"--node={place.task}", f"--nodes={place.tasks}", f"--address={place.address}",
            f"--port={place.port}", f"--cpus={ranks * resources.cpus_per_rank}",
            f"--gpus={resources.gpus_per_node}", f"--shared={variables['MUSTER_SHARED']}", f"--local={local}",
            f"--mark={LOG_PREFIX}", "--", *rest,
        ]  # fmt: skip
    return [
        interpreter, "-m", "torch.distributed.run", f"--nnodes={place.tasks}", f"--node-rank={place.task}",
        f"--nproc-per-node={ranks}", f"--master-addr={place.address}", f"--master-port={place.port}", "--tee=3",
        f"--log-dir={local}/torchrun", *rest,
    ]  # fmt: skip


def accelerate_settings(variables: Mapping[str, str]) -> dict[str, object]:
    """Return the config file of `accelerate launch`. Without one it would read that of the user's home.

    MULTI_GPU makes it start torchrun and leave the variables ACCELERATE_* and FSDP_* of the job as they are, with and without
    GPUs. As FSDP or DEEPSPEED it would set them again from options and defaults of its own.
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": variables["ACCELERATE_MIXED_PRECISION"],
        "use_cpu": False,
        "debug": False,
    }


def split_python(given: list[str], python: str) -> tuple[str, list[str]]:
    """Return the interpreter that a command names, or `python`, and the script or `-m module` with its arguments."""
    first = PurePath(given[0]).name
    if not first.startswith("python"):
        return python, given
    interpreter = python if given[0] in PYTHONS else given[0]
    rest = given[1:]
    while rest and rest[0] in ("-u", "-B"):
        rest = rest[1:]
    return interpreter, rest
