"""Receives requests to stop (by a signal, a file or the clock) and to save (by a file); training reads them at step boundaries.

This file must not import torch at its top: the handlers are set before torch is imported, which takes seconds.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from conf.errors import Stopped
from conf.schema import Config

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""USR2: Slurm sends it before the time limit, as `--signal` requests. USR1: sent by hand. TERM: preemption and scancel."""
PRIORITY = ("preempted", "time_limit", "stopped")
"""Statuses from the lowest to the highest priority. If ranks got different requests, all of them record the highest one."""
FILE_CHECK_S = 5.0
"""Seconds between checks for the files. On a network file system each check is a round trip."""
EARLY_S = 65
"""Seconds before MUSTER_STOP_AT from which on a signal means the time limit: Slurm sends its warning up to a minute early."""

Request = tuple[str, str]
"""(status of the verdict, its reason)"""


class StopFlag:
    """The flag of one rank. Training asks `requested()` at step boundaries, and then all ranks save together.

    Saving inside the signal handler would hang: the other ranks may be at another point of the step.
    """

    def __init__(self, stop_at: float | None = None) -> None:
        self.stop_at = stop_at
        """Unix time at which to stop without a signal; `launcher.supervise.attempt begin` computes it."""
        self.file: Path | None = None
        """The stop file. Only rank 0 has a path here and checks for it; the others learn of it from rank 0."""
        self.save_file: Path | None = None
        """The file by which `muster save` asks for a checkpoint. Only rank 0 has a path here, as with the stop file."""
        self.request: Request | None = None
        """The first request that this rank noticed. It does not change afterwards."""
        self._signal: tuple[signal.Signals, float] | None = None
        self._next_file_check = 0.0
        self._next_save_check = 0.0

    def set(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler: record the signal and its time, nothing more."""
        self._signal = (signal.Signals(number), time.time())

    def requested(self) -> bool:
        """Whether this rank was asked to stop. Reads the clock, and on rank 0 the file system every FILE_CHECK_S seconds."""
        self.request = self.request or self._by_signal() or self._by_clock() or self._by_file()
        return self.request is not None

    def _by_signal(self) -> Request | None:
        if self._signal is None:
            return None
        number, received_at = self._signal
        near_limit = self.stop_at is not None and received_at >= self.stop_at - EARLY_S
        return ("time_limit" if near_limit else "preempted", f"told to stop by {number.name}")

    def _by_clock(self) -> Request | None:
        if self.stop_at is None or time.time() < self.stop_at:
            return None
        return "time_limit", "the job's time is nearly up"

    def _by_file(self) -> Request | None:
        if self.file is None or time.monotonic() < self._next_file_check:
            return None
        self._next_file_check = time.monotonic() + FILE_CHECK_S
        if not self.file.exists():
            return None
        return "stopped", self.file.read_text(encoding="utf-8") or "asked to stop by muster stop"

    def save_requested(self) -> bool:
        """Whether this rank, rank 0, was asked for a checkpoint since the last call. Removes the file that asked."""
        if self.save_file is None or time.monotonic() < self._next_save_check:
            return False
        self._next_save_check = time.monotonic() + FILE_CHECK_S
        try:
            self.save_file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:  # the file would ask again and again
            log.warning(f"muster save: {self.save_file} cannot be removed, so it is not followed: {error}")
            self.save_file = None
            return False
        return True

    def agree_on_request(self) -> Request:
        """The status and reason that all ranks record. All ranks call this once any of them has a request."""
        import torch.distributed as dist  # not at the top: a signal during the import of torch must find its handler

        requests: list[Request | None] = [None] * dist.get_world_size()
        dist.all_gather_object(requests, self.request if self.requested() else None)
        return max((request for request in requests if request), key=lambda request: PRIORITY.index(request[0]))

    def raise_stopped(self, request: Request, step: int, steps: int) -> None:
        """Raise Stopped with the request that the ranks agreed on, after `step` of `steps` is saved."""
        status, reason = request
        saved = f"saved at step {step} of {steps}" if step else "nothing to save yet"
        raise Stopped(status, f"{reason}; {saved}")


_installed: StopFlag | None = None


def install_handlers() -> StopFlag:
    """Install the signal handlers, and return the flag they set. Every call in a process returns the same flag."""
    global _installed
    if _installed is None:
        stop_at = os.environ.get("MUSTER_STOP_AT")  # noqa: TID251 (before jobs.distributed.process_group, which imports torch)
        _installed = StopFlag(float(stop_at) if stop_at else None)
        for number in SIGNALS:
            signal.signal(number, _installed.set)
    return _installed


@contextmanager
def watch(config: Config, job: str = "train") -> Iterator[StopFlag]:
    """Yield the flag that training reads inside this context, and restore the earlier signal handlers afterwards.

    The flag is set by a signal (also by one since `install_handlers`), by the clock, or by the file RUN/jobs/train/stop. The
    file RUN/jobs/train/save asks for a checkpoint.
    """
    global _installed
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = install_handlers()
    rank = os.environ.get("RANK", "0")  # noqa: TID251 (same reason)
    folder = Path(config.run_dir) / "jobs" / job
    stop.file, stop.save_file = (folder / "stop", folder / "save") if rank == "0" else (None, None)
    try:
        yield stop
    finally:
        _installed = None
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_signal(record: Callable[[str, str], None]) -> None:
    """For jobs that have nothing to save: a signal calls `record(status, reason)` and ends the process with exit code 3."""
    stop, owner = install_handlers(), os.getpid()

    def leave(number: int, _: FrameType | None = None) -> None:
        stop.set(number)
        # The worker processes of a pool get the signal too, but only the job itself writes a verdict
        if os.getpid() == owner and stop.requested() and stop.request:
            record(*stop.request)
            sys.stdout.flush()
        os._exit(3)

    if stop.requested():  # a signal came before this call
        leave(signal.SIGTERM)
    for number in SIGNALS:
        signal.signal(number, leave)
