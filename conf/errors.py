"""The errors a user can mend: each is printed as one message with key, value and remedy, never as a traceback.

MusterError
├── Stopped              a job saved its work and ended early because it was told to; not an error of anybody's
└── UserError          something the user can change; carries every Problem found, exit code 2
    ├── ConfigError    a key or a value of the configuration
    ├── DataError      the rows, files or tokenizer given to preprocess
    ├── RunError       the run folder: exists with another config, incomplete, not writable
    ├── DivergedError  training whose loss no longer falls but rises, and stays up
    └── SiteError      this machine or cluster lacks what the config asks for (Slurm, GPUs, ports)
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in words a user can act on."""

    key: str
    value: object
    remedy: str

    def __str__(self) -> str:
        shown = "" if self.value is None else f"={self.value}"
        return f"{self.key}{shown}: {self.remedy}"


class MusterError(Exception):
    """Raised for anything Muster itself reports; never raised directly."""


class Stopped(MusterError):
    """Raised by a job that was told to end early, once its work is saved; `status` is its verdict."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


class UserError(MusterError):
    """Raised when the user can mend what is wrong; str() is one line a problem."""

    exit_code: ClassVar[int] = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class ConfigError(UserError):
    """Raised for a key or value of the configuration (e.g. `train.steps=-1`)."""


class DataError(UserError):
    """Raised for input rows that cannot be trained on (e.g. a file without the needed columns)."""


class RunError(UserError):
    """Raised for a run folder that cannot be used (e.g. it holds a run with another config)."""


class DivergedError(UserError):
    """Raised when training cannot come to anything: its loss has risen and stays up. Never started again by itself."""


class SiteError(UserError):
    """Raised when this machine or cluster lacks what the config asks for (e.g. no sbatch, no free GPU)."""


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
