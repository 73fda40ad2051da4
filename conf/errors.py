"""Errors that a user can fix. Each is printed as one line per problem with key, value and what to do, never as a traceback.

MusterError
├── Stopped            a job was asked to stop early and has saved its work; nothing went wrong
├── ProgramFailed      the user's own program, which the job `custom` runs, failed
└── UserError          something that the user can change; carries every Problem that was found; exit code 2
    ├── ConfigError    a key or a value of the configuration
    ├── DataError      the rows, files or tokenizer given to preprocess
    ├── RunError       the run folder: it exists with another config, is incomplete or is not writable
    ├── DivergedError  training whose loss rose and does not come down again
    └── SiteError      this machine or cluster lacks what the config asks for (Slurm, GPUs, ports)
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from conf.visible import visible


def as_typed(value: object) -> str:
    """A value as the user types it on the command line: `true`, `null`, the name of an option."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `str()` gives `key=value: message`."""

    key: str
    value: object
    """The wrong value; None to show the key alone."""
    message: str
    """What is wrong, why, and what to type instead."""

    def __str__(self) -> str:
        value = "" if self.value is None else f"={as_typed(self.value)}"
        return f"{self.key}{value}: {self.message}"


class MusterError(Exception):
    """Base class of everything that Muster itself reports; never raised directly."""


class Stopped(MusterError):
    """Raised by a job that was asked to stop early, after it has saved its work. `status` becomes its verdict."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


class ProgramFailed(MusterError):
    """Raised when the user's own program failed. `str()` is its last exception, as far as its output shows one."""

    def __init__(self, rank: int, message: str, exception: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.exception = exception
        """Name of the exception's class, without its module; empty if the output shows none."""
        self.trace = trace
        """The traceback."""


class UserError(MusterError):
    """Raised when the user can fix what is wrong. `str()` gives one line per problem."""

    exit_code: ClassVar[int] = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(visible(str(problem)) for problem in problems))


class ConfigError(UserError):
    """Raised for a key or value of the configuration (for example `train.steps=-1`)."""


class DataError(UserError):
    """Raised for input rows that cannot be trained on (for example a file without the needed columns)."""


class RunError(UserError):
    """Raised for a run folder that cannot be used (for example one that holds a run with another config)."""


class DivergedError(UserError):
    """Raised when the training loss has risen and stays high. Muster never restarts such a job by itself."""


class SiteError(UserError):
    """Raised when this machine or cluster lacks what the config asks for (for example sbatch, or a free GPU)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its class. After a colon, the next line follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    end = next((number for number, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:end]) or type(error).__name__
