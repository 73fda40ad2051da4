"""The work itself. `run` is all that the launcher knows of it; nothing heavy is imported before a job is named."""

from importlib import import_module
from pathlib import Path

from conf.errors import ConfigError, Problem
from conf.jobs import JOB_KINDS


def run(name: str, config_path: str) -> None:
    """Run one job on this rank. Raises UserError for what the user can mend, Stopped when it was told to end early."""
    if name not in JOB_KINDS:
        raise ConfigError(Problem("job", name, f"no such job; there are {', '.join(JOB_KINDS)}"))
    from conf.resolve import load  # imports omegaconf

    config = load(Path(config_path))
    if name == "train":
        from jobs.tensor_io import prefetch

        prefetch.begin(config)
    import_module(f"jobs.{name}").run(config)
