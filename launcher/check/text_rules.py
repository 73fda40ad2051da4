"""Rules for texts that reach a script, Slurm or the environment: names of options and variables, and the path of the run; pure."""

import re
from collections.abc import Iterator

from conf.choices import Container
from conf.errors import Problem
from conf.schema import Config

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
SIGNS_IN_RUN_DIR = {
    ":": "which separates the folders of PYTHONPATH, so that jobs would run other code",
    "%": "which Slurm would expand",
    "\\": "which Slurm removes from the names of log files",
}
"""What a run's path must not contain, and why."""


def problems(config: Config) -> Iterator[Problem]:
    if not re.fullmatch(r"[\w.+-]*", config.name):
        message = "may contain only letters, digits, '.', '_', '+' and '-', because jobs and folders are named after it"
        yield Problem("name", config.name, message)
    yield from _run_dir(config)
    for name in config.cluster.environment:
        if not VARIABLE.fullmatch(name):
            yield Problem(
                f"cluster.environment.{name}", None, "is not a valid variable name. Use only A-Z, a-z, 0-9 and _"
            )
    for name in config.cluster.secrets:
        if not VARIABLE.fullmatch(name):
            message = "is not the name of a variable. Write names alone, for example cluster.secrets=[HF_TOKEN]"
            yield Problem("cluster.secrets", "(hidden)", message)
    for section in ("train", "cpu", "inference"):
        for option in getattr(config.cluster, section).sbatch:
            if not OPTION.fullmatch(option):
                message = "is not the long name of an sbatch option. Write it without -- and without its value"
                yield Problem(f"cluster.{section}.sbatch.{option}", None, message)


def _run_dir(config: Config) -> Iterator[Problem]:
    signs = dict(SIGNS_IN_RUN_DIR)
    if config.cluster.container is not Container.none:
        signs[","] = "which separates the mounts of a container"
    for sign, reason in signs.items():
        if sign in config.run_dir:
            yield Problem("run_dir", config.run_dir, f"must not contain {sign}, {reason}. Choose another run_dir")
