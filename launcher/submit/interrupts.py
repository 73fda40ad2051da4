"""Notices Ctrl-C, SIGTERM, SIGHUP and a closed terminal while jobs run on this machine, so that these can save before they end."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

NAMES = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "the end of the terminal or pipe (SIGHUP)",
}
SAME_REQUEST_S = 1.0
"""Signals that come so soon after the first one are the same request: `timeout` sends two, and so does a terminal that closes."""


class Interrupts:
    """What this process was asked by signals. Its owner looks at it between two lines of a log."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        """The first request: stop, and save."""
        self.again = False
        """Whether a second Ctrl-C or SIGTERM has come: end at once."""
        self._first_at = 0.0

    @property
    def name(self) -> str:
        """How a reader calls the first request."""
        return NAMES[self.first] if self.first else ""

    @property
    def exit_code(self) -> int:
        """The exit code of a shell for the first request; 0 if there is none."""
        return 128 + self.first if self.first else 0

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """The signal handler."""
        if number == signal.SIGHUP:
            for stream in (sys.stdout, sys.stderr):
                if stream.isatty():
                    _silence(stream)
        if self.first is None:
            self.first, self._first_at = signal.Signals(number), time.monotonic()
        elif number != signal.SIGHUP and time.monotonic() - self._first_at > SAME_REQUEST_S:
            self.again = True

    def say(self, text: str, stream: TextIO) -> None:
        """Print a line."""
        with self.writing(stream):
            print(text, file=stream, flush=True)

    @contextmanager
    def writing(self, stream: TextIO) -> Iterator[None]:
        """If the reader of a stream is gone, as with a closed terminal or `| head`, take that for a request to stop."""
        try:
            yield
        except OSError:
            _silence(stream)
            self.receive(signal.SIGHUP)


@contextmanager
def noticed() -> Iterator[Interrupts]:
    """Collect requests during the block, instead of raising KeyboardInterrupt or ending.

    A signal that this process was started to ignore is still ignored: SIGHUP under nohup, SIGINT behind `&` in a script.
    """
    requests = Interrupts()
    before = {number: signal.getsignal(number) for number in NAMES}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, requests.receive)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silence(stream: TextIO) -> None:
    """Let a stream write to nowhere from now on: there is nobody who reads it, and each write would raise an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
