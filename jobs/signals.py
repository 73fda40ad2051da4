"""Being told to stop: a signal only sets a flag, which the training loop reads at the next step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Truthy once a signal has come. Saving inside the handler would hang: the other ranks are elsewhere in the step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def set(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)


@contextmanager
def watched() -> Iterator[Stop]:
    """Slurm's warnings (USR1, USR2: time limit; TERM: preemption, scancel) set the flag while the block runs."""
    stop = Stop()
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = {number: signal.signal(number, stop.set) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
