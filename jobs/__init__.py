"""The jobs of a run, which work on compute nodes. The launcher calls only `run`. May import conf, never launcher.

Each job module is imported only when its job runs: torch and transformers take seconds to import.
"""

from importlib import import_module
from pathlib import Path

from conf import packages
from conf.errors import ConfigError, Problem
from conf.jobs import JOB_KINDS


def run(name: str, config_path: str) -> None:
    """Run one job on this rank, with the config of `config_path` (RUN/config.yaml).

    Raises UserError for a mistake that the user can correct, and Stopped if the job was asked to end early.
    """
    if name not in JOB_KINDS:
        raise ConfigError(Problem("job", name, f"unknown job; choose one of {', '.join(JOB_KINDS)}"))
    from conf.resolve import load  # imports omegaconf

    config = load(Path(config_path))
    if missing := list(packages.missing(config)):  # before the first job spends anything
        raise ConfigError(*missing)
    if name == "train":
        # reads the model's files into the page cache while the packages of the job are imported
        from jobs.tensor_io import prefetch

        prefetch.begin(config)
    import_module(f"jobs.{name}").run(config)
