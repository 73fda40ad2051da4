"""Finds the processes that the user's program consists of, and sends them signals."""

import ctypes
import os
import resource
import signal
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
"""prctl's request to become the parent of orphans."""


def descendants(root: int) -> list[int]:
    """Return `root` and all processes below it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int(
                    (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
                )
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def handles(process: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler of its own for a signal. Without one, USR1 would end it."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def tell(root: int, number: signal.Signals) -> None:
    """Send a signal to every process of the program that handles it."""
    for process in descendants(root):
        if handles(process, number):
            with suppress(ProcessLookupError):
                os.kill(process, number)


def abort_ranks(root: int) -> None:
    """Abort the ranks of the program: with PYTHONFAULTHANDLER, Python then writes the stacks of all threads to stderr.

    Processes that a rank has started, such as those that load data, are left alone, and so is torchrun, which has no RANK.
    """
    ranks = {process for process in descendants(root) if _is_rank(process) and handles(process, signal.SIGABRT)}
    below = {process for rank in ranks for process in descendants(rank)[1:]}
    for process in ranks - below:
        with suppress(OSError):
            resource.prlimit(process, resource.RLIMIT_CORE, (0, 0))  # no file with all the memory of the rank
            os.kill(process, signal.SIGABRT)


def _is_rank(process: int) -> bool:
    with suppress(OSError):
        return any(item.startswith(b"RANK=") for item in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    return False


def adopt_orphans() -> None:
    """From now on, processes whose parent ends become children of this one, so that `end` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end(root: int, spared: Collection[int] = ()) -> None:
    """Kill a process and all below it, but none of `spared`."""
    for process in descendants(root):
        if process not in spared:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
