"""Looks at ranks of this node that do not move: what the kernel says of them, their Python stacks, NCCL's flight recorder."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.supervise import hang_diagnosis

ANSWER_S = 6.0
"""How long ranks may take to write their stacks, and NCCL's recorder its file; it looks for the wish once a second."""
PAUSE_S = 0.5
LOOKS = 3
"""Looks at a process before it counts as stuck in a system call: any process is in one now and then."""
PIPE = "flight-"
"""TORCH_NCCL_DEBUG_INFO_PIPE_FILE, with the folder of the heartbeats before it; torch adds the rank and `.pipe`."""


def ask(beats: dict[int, dict[str, Any]], local: Path, attempt: Path) -> None:
    """Add `state`, `stack` and `flight` to the heartbeats of ranks; their stacks and recorders are kept with the attempt."""
    alive = {rank: item for rank, item in beats.items() if item["phase"] != "ended"}
    states: dict[int, set[str]] = {rank: set() for rank in alive}
    asked, waits = time.time(), set(alive)
    for rank, item in alive.items():
        kill(item, signal.SIGQUIT)  # jobs.distributed.heartbeat.ASK
        _poke(local / f"{PIPE}{rank}.pipe")
    for look in range(int(ANSWER_S / PAUSE_S)):
        time.sleep(PAUSE_S)
        for rank, item in alive.items():
            states[rank].add(state(item["pid"]))
        waits = {
            rank for rank in waits if not states[rank] & {"T", "t", "Z"} and not _answered(rank, local, attempt, asked)
        }
        if not waits and look + 1 >= LOOKS:
            break
    for rank, item in alive.items():
        seen = states[rank]
        item["state"] = next((letter for letter in "ZTt" if letter in seen), seen.pop() if len(seen) == 1 else "S")
        item["stack"] = _kept(local / f"rank-{rank}.stack", attempt)
        item["flight"] = _flight(rank, attempt, asked)


def _answered(rank: int, local: Path, attempt: Path, asked: float) -> bool:
    """Whether the stacks are there and, where NCCL was asked, its file, both at rest."""
    wanted = [local / f"rank-{rank}.stack"]
    if (local / f"{PIPE}{rank}.pipe").exists():
        wanted.append(_dump(rank, attempt))
    try:
        about = [path.stat() for path in wanted]
    except OSError:
        return False
    return all(item.st_size and asked - 1 <= item.st_mtime < time.time() - PAUSE_S / 2 for item in about)


def _kept(path: Path, attempt: Path) -> str:
    """The text of a file of stacks, once it stands with the attempt; empty where a rank wrote none."""
    text = ""
    with suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text:
            (attempt / path.name).write_text(text, encoding="utf-8")
    return text


def _flight(rank: int, attempt: Path, asked: float) -> dict[str, Any] | None:
    """What the recorder wrote since it was asked; its file then stands with the attempt, as flight-R."""
    with suppress(OSError):
        dump = _dump(rank, attempt)
        if dump.stat().st_mtime >= asked - 1:
            os.replace(dump, attempt / f"flight-{rank}")
            return hang_diagnosis.flight((attempt / f"flight-{rank}").read_bytes())
    return None


def _dump(rank: int, attempt: Path) -> Path:
    """What TORCH_FR_DUMP_TEMP_FILE, see `launcher.environment`, makes of a rank."""
    return attempt.parent / f"flight_rank_{rank}"


def _poke(pipe: Path) -> None:
    """Ask torch's recorder for its file; there is a pipe where the rank uses NCCL."""
    with suppress(OSError):
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)


def kill(beat: dict[str, Any], number: signal.Signals) -> None:
    """Send a signal to a rank, where it is still that process; SIGKILL ends a stopped one, too."""
    if is_there(beat):
        with suppress(ProcessLookupError):
            os.kill(beat["pid"], number)


def is_there(beat: dict[str, Any]) -> bool:
    """Whether the rank that left a heartbeat lives, and its number is not that of a later process."""
    return beat["born"] is not None and born(beat["pid"]) == beat["born"]


def born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None once it is gone."""
    words = _stat(pid)
    return None if not words or words[0] in "ZX" else words[19]


def state(pid: int) -> str:
    """The kernel's letter for what a process does: R, S, D, T, ...; Z where it is gone."""
    return (_stat(pid) or ["Z"])[0]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: the name before them may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
