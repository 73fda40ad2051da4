"""Runs one command of Slurm: in a clean environment, and again for as long as Slurm is only busy.

Standard library only: this file also runs on the compute node, outside the container, before any environment is set up.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

TRANSIENT = (
    # the controller has no time, starts again, or is being replaced by its backup
    "Socket timed out",
    "Zero Bytes were transmitted",
    "standby mode",
    "Unable to contact slurm controller",
    "Rate limit exceeded",
    "temporarily unable to accept job",
    "Unable to create job record, try again",
    "try again later",
    "Process is shutting down",
    # the network, or this machine
    "Resource temporarily unavailable",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Connection rejected by handler",
    "Communication connection failure",
    "Message send failure",
    "Message receive failure",
    "Communication shutdown failure",
    "No route to host",
    "Network is unreachable",
    "Broken pipe",
    "Too many open files",
    "Cannot allocate memory",
    # a loaded or restarted munged, or clocks that differ for a moment
    "credential expired",
    "Expired credential",
    "Rewound credential",
    "Munge decode failed",
    "Munge encode failed",
    "Failed to access .*munge",
    "Protocol authentication error",
    # slurmdbd
    "Unable to connect to database",
    "Problem talking to the database",
)
"""What Slurm prints (regular expressions) for an error that passes by itself. Every other error is final."""

NOT_DELIVERED = ("connect failure", "standby mode", "Rate limit exceeded", "Connection refused")
"""Of these: the controller has not even received the request. After the others it may have done what was asked."""

FINDS_THE_CLUSTER = (
    "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_JWKS", "SLURM_SACK_SOCKET"
)  # fmt: skip
"""Variables that only say where the controller is, and who asks. They stay."""

OF_A_JOB = (
    "SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SUBMITIT_",
    "PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "PALS_", "MUSTER_ATTEMPT", "MUSTER_STOP_AT", "MUSTER_SWEEP", "TORCHELASTIC_",
)  # fmt: skip
"""Beginnings of variables that a job, one of its steps or a profile sets, and that would change what a command does.

For example SLURM_CPU_BIND of a step binds all ranks of a job that is submitted from it to one core, SLURM_MEM_PER_CPU makes
srun refuse to start, SBATCH_PARTITION beats the script, and SQUEUE_PARTITION hides jobs."""

DEVICES_OF_A_JOB = (
    "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK"
)  # fmt: skip
"""Set by Slurm inside a job: the GPUs of that job."""

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class SlurmError(Exception):
    """Raised when a Slurm command fails or is not installed. The message is the command's first error line."""


class NoSlurmError(SlurmError):
    """Raised when a Slurm command is not installed on this machine."""


class BusyError(SlurmError):
    """Raised when Slurm did not answer, and may do so later."""

    @property
    def delivered(self) -> bool:
        """Whether Slurm may have done what was asked."""
        return not re.search("|".join(NOT_DELIVERED), str(self), re.IGNORECASE)


class Output(NamedTuple):
    """What a command printed."""

    stdout: str
    stderr: str


class Patience:
    """How long the commands of a block are tried again, all of them together."""

    def __init__(self, total_s: float) -> None:
        self.left_s = total_s
        self.has_told = False

    def pause(self, error: BusyError, tries: int, spent_s: float) -> None:
        """Wait before the next try of a command that failed after `spent_s`. Raises `error` if no time is left.

        The pauses grow, and differ between jobs: many of them ask at once when a controller comes back.
        """
        self.left_s -= spent_s
        if self.left_s <= 0:
            raise error
        if not self.has_told:
            limit = "" if math.isinf(self.left_s) else f" for up to {self.left_s:.0f} s"
            print(f"muster: Slurm does not answer ({error}); trying again{limit}", file=sys.stderr, flush=True)
            self.has_told = True
        longest_s = min(LONGEST_PAUSE_S, SHORTEST_PAUSE_S * 1.6**tries)
        pause_s = min(random.uniform(longest_s / 2, longest_s), self.left_s)  # noqa: S311 - no secret
        self.left_s -= pause_s
        time.sleep(pause_s)


_patience: ContextVar[Patience] = ContextVar("_patience")


@contextmanager
def retrying(total_s: float = math.inf) -> Iterator[None]:
    """Try commands in this block again while Slurm is busy, for `total_s` in all; by default for as long as the job lives."""
    token = _patience.set(Patience(total_s))
    try:
        yield
    finally:
        _patience.reset(token)


def call(*words: str, timeout_s: float = 60) -> str:
    """Run a Slurm command and return what it prints. Raises SlurmError with its first error line.

    While Slurm is busy, the command is run again for as long as `retrying` allows; without `retrying`, not at all.
    """
    patience, tries = _patience.get(None), 0
    while True:
        began = time.monotonic()
        try:
            return run_once(words, timeout_s).stdout
        except BusyError as error:
            if patience is None:
                raise
            patience.pause(error, tries, time.monotonic() - began)
            tries += 1


def wait_after(error: BusyError, tries: int, spent_s: float) -> None:
    """Wait before the caller repeats what failed with `error`. Raises it if `retrying` allows no further try."""
    patience = _patience.get(None)
    if patience is None:
        raise error
    patience.pause(error, tries, spent_s)


def run_once(words: tuple[str, ...], timeout_s: float) -> Output:
    """Run a command once. Raises BusyError for an error in TRANSIENT and for no answer, SlurmError for any other."""
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of other users' jobs may have any bytes
            timeout=timeout_s,
            check=False,
            env=clean_environment(os.environ),
        )
    except FileNotFoundError:
        raise NoSlurmError(f"{words[0]} is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise BusyError(f"{words[0]} did not answer within {timeout_s:.0f} s") from None
    except BlockingIOError as error:  # no process can be started now
        raise BusyError(f"{words[0]}: {error.strerror}") from None
    if not done.returncode:
        return Output(done.stdout, done.stderr)
    lines = (done.stderr or done.stdout).strip().splitlines()
    transient = re.compile("|".join(TRANSIENT), re.IGNORECASE)
    if busy := next((line for line in lines if transient.search(line)), None):
        raise BusyError(busy.strip())
    raise SlurmError(_reason(lines) or f"{words[0]} exited with {done.returncode}")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what a surrounding job, its step or a profile would add to a command and to its job."""
    inside_a_job = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name in FINDS_THE_CLUSTER or not (name.startswith(OF_A_JOB) or (inside_a_job and name in DEVICES_OF_A_JOB))
    }


def _reason(lines: list[str]) -> str:
    """Return the error that a command gives, among the notices that a site adds.

    sbatch ends with its own reason. If that says nothing, a plugin of the site refused, and its lines come before it.
    """
    last = next((line.strip() for line in reversed(lines) if "submission failed:" in line), "")
    if last and not last.endswith("Unspecified error"):
        return last
    if last:
        said = [line.strip().removeprefix("sbatch: error: ") for line in lines if line.strip() != last]
        return " | ".join([last, *said])
    errors = [line.strip() for line in lines if "error:" in line]
    return next(iter(errors or lines), "").strip()
