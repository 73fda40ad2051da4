"""The mark that a rank leaves at every step and phase: by it `launcher.supervise.watchdog`, another process, tells a
hang from work.

The training loop makes it itself, since a thread would go on while the loop hangs; on the node's own disk, so that a network
file system that does not answer holds up no step. Without `listen`, as under torchrun, nothing is marked.
"""

import faulthandler
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

BYTES = 256
"""Of a record: one write into the same place, so that a reader hardly ever meets a half of it."""
FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
ASK = signal.SIGQUIT
"""Makes a rank write its Python stacks, also while it is stuck in C. Neither Slurm nor
`jobs.distributed.stop_signals` has a use for it."""

_file: int | None = None
_stacks: int | None = None
_record: dict[str, Any] = {}


def listen(folder: Path, rank: int, host: str = "") -> None:
    """Mark in `folder`/rank-R.beat from now on, and write the stacks to rank-R.stack when asked. Raises OSError."""
    global _file, _stacks
    close()
    path = folder / f"rank-{rank}.beat"
    _stacks = os.open(path.with_suffix(".stack"), FLAGS, 0o600)
    signal.signal(ASK, signal.SIG_IGN)  # what `close` brings back: asked too late, a rank must not die of it
    faulthandler.register(ASK, _stacks, all_threads=True)
    _record.update(rank=rank, host=host or socket.gethostname(), pid=os.getpid(), count=0, step=0, path=str(path))
    _file = os.open(path, FLAGS, 0o600)
    beat("start")


def beat(phase: str, step: int | None = None) -> None:
    """This rank gets on: it is in `phase` (start, load, train, evaluate, save or finish), and with `step` at that one.

    All ranks call this equally often, so the rank with the smallest count is behind. Takes microseconds.
    """
    if _file is None:
        return
    _record.update(phase=phase, step=_record["step"] if step is None else step, count=_record["count"] + 1)
    _write()


def alive() -> None:
    """This rank is at work on a part of its own, such as its slices of the weights: as far as it was, but not silent."""
    if _file is not None:
        _write()


def _write() -> None:
    assert _file is not None
    _record["time"] = round(time.time(), 3)
    said = {key: value for key, value in _record.items() if key != "path"}
    with suppress(OSError):  # a full disk under /tmp is no reason to end a training
        os.pwrite(_file, json.dumps(said).encode().ljust(BYTES), 0)


def close() -> None:
    """This rank is done: it is not waited for any more."""
    global _file, _stacks
    if _file is None or _stacks is None:
        return
    faulthandler.unregister(ASK)
    os.close(_file)
    os.close(_stacks)
    _file = _stacks = None
    path = Path(_record["path"])
    for suffix in (".beat", ".stack"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    with suppress(OSError):  # others are still at work
        path.parent.rmdir()
