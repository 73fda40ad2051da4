"""Being told to stop, by a signal, a stop file or the clock: only a flag is set, which training reads at step boundaries."""

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

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Slurm's warnings: USR2 before the time limit, as `--signal` asks, USR1 by hand, TERM for preemption and scancel."""
RANKING = ("preempted", "time_limit", "stopped")
"""What all ranks say when they were told different things: the last of these."""
LOOK_S = 5.0
"""Seconds between looks for the stop file: on a network file system each is a round trip."""
EARLY_S = 65
"""Slurm sends its warning up to a minute early; a signal no earlier than this before MUSTER_STOP_AT is about the time limit."""


class Stop:
    """Truthy once this rank was told to stop. Saving inside the handler would hang: the other ranks are elsewhere in the step."""

    def __init__(self, stop_at: float | None = None) -> None:
        self.stop_at = stop_at
        """Unix time at which to stop by itself; see `launcher.supervise.attempt begin`."""
        self.file: Path | None = None
        """Looked for by rank 0 alone, which tells the others."""
        self.told: tuple[str, str] | None = None
        """Status of the verdict, and its reason."""
        self._signal: tuple[signal.Signals, float] | None = None
        self._look_at = 0.0

    def set(self, number: int, _: FrameType | None = None) -> None:
        self._signal = (signal.Signals(number), time.time())

    def __bool__(self) -> bool:
        self.told = self.told or self._by_signal() or self._by_clock() or self._by_file()
        return self.told is not None

    def _by_signal(self) -> tuple[str, str] | None:
        if self._signal is None:
            return None
        number, came = self._signal
        late = self.stop_at is not None and came >= self.stop_at - EARLY_S
        return ("time_limit" if late else "preempted", f"told to stop by {number.name}")

    def _by_clock(self) -> tuple[str, str] | None:
        if self.stop_at is None or time.time() < self.stop_at:
            return None
        return "time_limit", "the job's time is nearly up"

    def _by_file(self) -> tuple[str, str] | None:
        if self.file is None or time.monotonic() < self._look_at:
            return None
        self._look_at = time.monotonic() + LOOK_S
        return ("stopped", "told to stop by python -m launcher stop") if self.file.exists() else None

    def agreed(self) -> tuple[str, str]:
        """Status and reason that all ranks record; all call this together once any of them was told to stop."""
        import torch.distributed as dist  # not before: a signal that comes while torch is imported must find its handler

        told: list[tuple[str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, self.told if self else None)
        return max((item for item in told if item), key=lambda item: RANKING.index(item[0]))

    def raise_stopped(self, told: tuple[str, str], step: int, steps: int) -> None:
        """Raise Stopped with what was agreed, once `step` of `steps` is saved."""
        saved = f"saved at step {step} of {steps}" if step else "nothing to save yet"
        raise Stopped(told[0], f"{told[1]}; {saved}")


_listening: Stop | None = None


def listen() -> Stop:
    """Let signals set the flag from now on; the same flag for all that call this in a process."""
    global _listening
    if _listening is None:
        stop_at = os.environ.get("MUSTER_STOP_AT")  # noqa: TID251 (before jobs.distributed.process_group, which imports torch)
        _listening = Stop(float(stop_at) if stop_at else None)
        for number in NUMBERS:
            signal.signal(number, _listening.set)
    return _listening


@contextmanager
def watched(config: Config) -> Iterator[Stop]:
    """Training's flag while the block runs: signals, also those since `listen`, the clock, and RUN/jobs/train/stop."""
    global _listening
    before = {number: signal.getsignal(number) for number in NUMBERS}
    stop = listen()
    rank = os.environ.get("RANK", "0")  # noqa: TID251 (likewise)
    stop.file = Path(config.run_dir) / "jobs" / "train" / "stop" if rank == "0" else None
    try:
        yield stop
    finally:
        _listening = None
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_once(say: Callable[[str, str], None]) -> None:
    """For jobs that have nothing to save: a signal ends the process with code 3, once `say` was given status and reason."""
    stop, owner = listen(), os.getpid()

    def leave(number: int, _: FrameType | None = None) -> None:
        stop.set(number)
        if os.getpid() == owner and stop and stop.told:  # a pool's workers were told too, and have nothing to say
            say(*stop.told)
            sys.stdout.flush()
        os._exit(3)

    if stop.told or stop:
        leave(signal.SIGTERM)
    for number in NUMBERS:
        signal.signal(number, leave)
