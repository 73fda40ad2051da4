"""Rules of the job `custom`, the user's own training program. Pure."""

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import PurePath

from conf.choices import Backend, ProgramLauncher
from conf.errors import Problem
from conf.schema import Config
from launcher import sbatch_options
from launcher.plan import starts_whole_nodes

AROUND = ("fetch", "preflight", "custom", "consolidate", "generate", "push")
"""Jobs that a run with a program of its own may have."""
STARTERS = {
    "torchrun": "torchrun",
    "accelerate": "accelerate",
    "deepspeed": "torchrun",
    "ray": "ray",
    "srun": "srun",
    "mpirun": "srun",
}
"""Programs that start ranks themselves, with the launcher to choose instead. Slurm would start them once for each rank or node."""
OWN_LAYOUT = ("--config_file", "--use_deepspeed", "--use_fsdp", "--use_parallelism_config", "--mixed_precision")
"""Options of `accelerate launch` that say what `parallel` and `train.precision` have said already."""
PER_TASK = {
    "cpus-per-task": "cpus_per_rank=...",
    "gpus-per-task": "gpus_per_node=...",
    "tres-per-task": "gpus_per_node=...",
}
"""Options of sbatch that count for each task, and the key for the same."""
OF_A_SHELL = ("&&", "||", "|", ";", "&", ">", ">>", "<")


def problems(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with `custom` and its jobs."""
    command = config.custom.command
    if command is None:
        if "custom" in config.jobs:
            message = 'names no program. Set it, for example custom.command="python train.py"'
            yield Problem("custom.command", "null", message)
        return
    if others := [job for job in config.jobs if job not in AROUND]:
        message = f"is a program of your own, which takes the place of {', '.join(others)}. Use pipeline=custom"
        yield Problem("custom.command", command, message)
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield Problem("custom.command", command, f"cannot be read ({error}). Close the quotes")
        return
    yield from _words(config, command, words)
    if starts_whole_nodes(config, "custom"):
        yield from _options_per_task(config)


def _options_per_task(config: Config) -> Iterator[Problem]:
    """sbatch counts these for each task, and here one task has all GPUs and CPUs of its node."""
    given = sbatch_options.given(config.cluster.train)
    for name, instead in PER_TASK.items():
        if given.get(name) is not None:
            message = (
                f"counts for each task, and custom.launcher={config.custom.launcher.name} has one task on each node. "
                f"Remove it and set cluster.train.{instead}"
            )
            yield Problem(f"cluster.train.sbatch.{name}", given[name], message)


def _words(config: Config, command: str, words: list[str]) -> Iterator[Problem]:
    first = PurePath(words[0]).name if words else ""
    launcher = config.custom.launcher
    srun = launcher is ProgramLauncher.srun
    if not words:
        yield Problem("custom.command", command, "names no program")
    elif sign := next((word for word in words if word in OF_A_SHELL), None):
        message = (
            f"is not run by a shell, so {sign} would be an argument. Put these commands into a script: bash train.sh"
        )
        yield Problem("custom.command", command, message)
    elif re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        name, _, value = words[0].partition("=")
        message = f"is not run by a shell. Set the variable with +cluster.environment.{name}={value}"
        yield Problem("custom.command", command, message)
    elif first in STARTERS:
        message = (
            f"{first} would start ranks again. Name the script alone, and choose custom.launcher={STARTERS[first]}"
        )
        yield Problem("custom.command", command, message)
    elif first.startswith("-") and words[0] != "-m" and launcher is ProgramLauncher.accelerate:
        yield from _options_of_accelerate(config, command, words)
    elif not srun and not (first.startswith("python") or words[0].endswith(".py") or words[0] == "-m"):
        message = f"custom.launcher={config.custom.launcher.name} starts Python scripts only. Use custom.launcher=srun"
        yield Problem("custom.command", command, message)


def _options_of_accelerate(config: Config, command: str, words: list[str]) -> Iterator[Problem]:
    """An own config of Accelerate, where it would contradict ours."""
    own = takewhile(lambda word: word != "-m" and not word.endswith(".py"), words)
    names = ["--" + word.removeprefix("--").partition("=")[0].replace("-", "_") for word in own]
    found = next((name for name in names if name in OWN_LAYOUT), None)
    is_ddp = config.parallel.backend is Backend.fsdp and config.parallel.shard_ranks == 1
    if found and not is_ddp:
        message = (
            f"{found} says what parallel={config.parallel.name} and train.precision say already. Remove it, or leave the layout "
            "to your own file with parallel=ddp"
        )
        yield Problem("custom.command", command, message)
