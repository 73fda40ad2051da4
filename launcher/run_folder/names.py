"""Gives a run that the user has not named a folder of its own: the time in its name has only seconds."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def is_named(composed: DictConfig) -> bool:
    """Whether the command line or an experiment says which folder the run has. The default has the time of the launch in it."""
    return "${now:" not in str(OmegaConf.to_container(composed)["run_dir"])  # type: ignore[call-overload, index]


def free(run_dir: str) -> str:
    """`run_dir` if there is no such folder, else `run_dir`-2 and so on."""
    return next(name for name in _names(run_dir) if not Path(name).exists())


def reserve(run_dir: str) -> str:
    """Make the folder of a run, which only one of several launches at the same time can. Returns its name. Raises OSError."""
    for name in _names(run_dir):
        try:
            Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        return name
    raise AssertionError("there is always another name")


def _names(run_dir: str) -> Iterator[str]:
    yield run_dir
    yield from (f"{run_dir}-{number}" for number in count(2))
