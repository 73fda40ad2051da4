"""Gives a run that the user has not named a folder of its own: the time in its name has only seconds."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path


def is_named(words: Sequence[str]) -> bool:
    """Whether the command line says which folder the run has."""
    return any(word.lstrip("+").startswith(("run_dir=", "resume=")) for word in words)


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
