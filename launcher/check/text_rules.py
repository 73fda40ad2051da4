"""Rules for texts that reach Slurm, the shell or the environment: the run's name and path, and the names of secrets; pure."""

import re
from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import Config

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SIGNS_IN_RUN_DIR = {
    ":": "PYTHONPATH is split there, and the jobs would run other code",
    "%": "Slurm would replace it in the names of log files",
    "\\": "Slurm removes it from the names of log files",
}
"""What a run's path must not contain, and why."""


def problems(config: Config) -> Iterator[Problem]:
    if not re.fullmatch(r"[\w.+-]*", config.name):
        message = "may contain only letters, digits, '.', '_', '+' and '-', because jobs and folders are named after it"
        yield Problem("name", config.name, message)
    for sign, reason in SIGNS_IN_RUN_DIR.items():
        if sign in config.run_dir:
            yield Problem("run_dir", config.run_dir, f"must not contain '{sign}': {reason}. Choose another run_dir")
    for name in config.cluster.secrets:
        if not VARIABLE.fullmatch(name):
            message = (
                "holds something that is not the name of a variable. Write names alone: cluster.secrets=[HF_TOKEN]"
            )
            yield Problem("cluster.secrets", None, message)
