"""Writes a rank's heartbeat at every step and phase. `launcher.supervise.watchdog`, another process, reads it to detect hangs.

The training loop itself writes it: a thread would go on while the loop hangs. The file is on the node's local disk, so that a
network file system that does not answer delays no step. Without `start`, as under torchrun, nothing is written.
"""

import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

BYTES = 256
"""Length of a heartbeat. It is always written with one call at offset 0, so that a reader hardly ever sees half of one."""
FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
STACKS_SIGNAL = signal.SIGQUIT
"""The signal that makes a rank write its Python stacks, even while it is stuck in C code. Neither Slurm nor
`jobs.distributed.stop_signals` uses it."""

_file: int | None = None
_stacks: int | None = None
_record: dict[str, Any] = {}


def start(folder: Path, rank: int, host: str = "") -> None:
    """Open this rank's heartbeat file, `folder`/rank-R.beat. From now on STACKS_SIGNAL writes the stacks to rank-R.stack.

    Raises OSError if a file cannot be created.
    """
    global _file, _stacks
    close()
    path = folder / f"rank-{rank}.beat"
    _stacks = os.open(path.with_suffix(".stack"), FLAGS, 0o600)
    # `faulthandler.unregister` in `close` restores this handler: a signal that comes later must not end the rank
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, _stacks, all_threads=True)
    _record.update(rank=rank, host=host or socket.gethostname(), pid=os.getpid(), count=0, step=0, path=str(path))
    _file = os.open(path, FLAGS, 0o600)
    beat("start")


def beat(phase: str, step: int | None = None) -> None:
    """Record progress: this rank is in `phase` (start, load, train, evaluate, save or finish), and at `step` if it is given.

    All ranks call this equally often, so a rank with a smaller count is behind the others. It takes microseconds.
    """
    if _file is None:
        return
    _record.update(phase=phase, step=_record["step"] if step is None else step, count=_record["count"] + 1)
    _write()


def refresh() -> None:
    """Write the current time, and leave phase, step and count as they are.

    For long work that each rank does alone, like reading its slices of the weights.
    """
    if _file is not None:
        _write()


def _write() -> None:
    assert _file is not None
    _record["time"] = round(time.time(), 3)
    heartbeat = {key: value for key, value in _record.items() if key != "path"}
    with suppress(OSError):  # a full /tmp must not end a training
        os.pwrite(_file, json.dumps(heartbeat).encode().ljust(BYTES), 0)


def answer_stacks_with(stacks: Callable[[], str]) -> None:
    """From now on, write what `stacks` returns when STACKS_SIGNAL comes: those of a program that this rank has started.

    Call it in the main thread, which must go on running Python.
    """
    if _stacks is None:
        return
    faulthandler.unregister(STACKS_SIGNAL)
    descriptor = _stacks

    def answer(*_: object) -> None:
        text = stacks().encode()
        with suppress(OSError):
            os.pwrite(descriptor, text, 0)

    signal.signal(STACKS_SIGNAL, answer)


def close() -> None:
    """Delete this rank's files: it is done, and the watchdog no longer waits for it."""
    global _file, _stacks
    if _file is None or _stacks is None:
        return
    faulthandler.unregister(STACKS_SIGNAL)
    signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    os.close(_file)
    os.close(_stacks)
    _file = _stacks = None
    path = Path(_record["path"])
    for suffix in (".beat", ".stack"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    with suppress(OSError):  # other ranks still have files in it
        path.parent.rmdir()
