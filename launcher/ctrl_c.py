"""Ctrl-C while a command imports its modules: one line and exit code 130, no traceback. Imports only small modules."""

import os
import signal
import sys
from types import FrameType


def ends_with_a_line(prog: str) -> None:
    """From now on, Ctrl-C prints `PROG: stopped` and ends the process at once. For times in which there is nothing to clean up.

    A process that was started to ignore Ctrl-C still ignores it.
    """

    def end(_: int, __: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), f"{prog}: stopped\n".encode())
        os._exit(128 + signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
        _set_here.append(end)


def raises() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again, so that `with` and `finally` clean up."""
    if signal.getsignal(signal.SIGINT) in _set_here:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_set_here: list[object] = []
