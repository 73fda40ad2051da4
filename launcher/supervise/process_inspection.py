"""Inspects ranks of this node that have fallen silent: process states, Python stacks and NCCL's flight recorder.

In this file a `heartbeat` is the record that jobs/distributed/heartbeat.py writes, with the watchdog's additions.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.supervise import hang_diagnosis

ANSWER_S = 6.0
"""How long ranks may take to write their stacks, and NCCL's flight recorder its file. It checks its pipe once a second."""
PAUSE_S = 0.5
SAMPLES = 3
"""How many times the state is read before a process counts as stuck in a system call. Any process is in one now and then."""
PIPE = "flight-"
"""End of TORCH_NCCL_DEBUG_INFO_PIPE_FILE, after the folder of the heartbeats. torch appends the rank and `.pipe`."""


def inspect_ranks(heartbeats: dict[int, dict[str, Any]], local: Path, attempt: Path) -> None:
    """Add `state`, `stack` and `flight` to the heartbeats of ranks that have not ended.

    `local` is the node's folder of heartbeats. Also copies the stacks and the recorders' files to the folder `attempt`.
    """
    running = {rank: heartbeat for rank, heartbeat in heartbeats.items() if heartbeat["phase"] != "ended"}
    states: dict[int, set[str]] = {rank: set() for rank in running}
    asked, waiting_for = time.time(), set(running)
    for rank, heartbeat in running.items():
        send_signal(heartbeat, signal.SIGQUIT)  # jobs.distributed.heartbeat.STACKS_SIGNAL: write the Python stacks
        _request_flight_record(local / f"{PIPE}{rank}.pipe")
    for sample in range(int(ANSWER_S / PAUSE_S)):
        time.sleep(PAUSE_S)
        for rank, heartbeat in running.items():
            states[rank].add(process_state(heartbeat["pid"]))
        waiting_for = {
            rank
            for rank in waiting_for
            if not states[rank] & {"T", "t", "Z"} and not _has_answered(rank, local, attempt, asked)
        }
        if not waiting_for and sample + 1 >= SAMPLES:
            break
    for rank, heartbeat in running.items():
        letters = states[rank]
        # Several letters mean that the process was changing between states, so it is not stuck: S.
        letter = next(iter(letters)) if len(letters) == 1 else "S"
        heartbeat["state"] = next((stopped for stopped in "ZTt" if stopped in letters), letter)
        heartbeat["stack"] = _copy_stack(local / f"rank-{rank}.stack", attempt)
        heartbeat["flight"] = _keep_flight_record(rank, attempt, asked)


def _has_answered(rank: int, local: Path, attempt: Path, asked: float) -> bool:
    """Return whether the rank's files are complete: its stacks and, if it uses NCCL, the flight recorder's file.

    A file counts as complete when it is new, not empty, and has not changed for PAUSE_S / 2.
    """
    expected = [local / f"rank-{rank}.stack"]
    if (local / f"{PIPE}{rank}.pipe").exists():
        expected.append(_flight_file(rank, attempt))
    try:
        stats = [path.stat() for path in expected]
    except OSError:
        return False
    return all(item.st_size and asked - 1 <= item.st_mtime < time.time() - PAUSE_S / 2 for item in stats)


def _copy_stack(path: Path, attempt: Path) -> str:
    """Return the text of a file of stacks, and copy the file to `attempt`. Empty if the rank wrote none."""
    text = ""
    with suppress(OSError):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text:
            (attempt / path.name).write_text(text, encoding="utf-8")
    return text


def _keep_flight_record(rank: int, attempt: Path, asked: float) -> dict[str, Any] | None:
    """Move the recorder's file to `attempt`/flight-R and return its content; None if it has written none since `asked`."""
    with suppress(OSError):
        dump = _flight_file(rank, attempt)
        if dump.stat().st_mtime >= asked - 1:
            os.replace(dump, attempt / f"flight-{rank}")
            return hang_diagnosis.read_flight_record((attempt / f"flight-{rank}").read_bytes())
    return None


def _flight_file(rank: int, attempt: Path) -> Path:
    """Return the file that torch writes for a rank: TORCH_FR_DUMP_TEMP_FILE (see launcher.environment) plus the rank."""
    return attempt.parent / f"flight_rank_{rank}"


def _request_flight_record(pipe: Path) -> None:
    """Ask torch's flight recorder to write its file. The pipe exists only if the rank uses NCCL."""
    with suppress(OSError):
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)


def send_signal(heartbeat: dict[str, Any], number: signal.Signals) -> None:
    """Send a signal to a rank, unless its process has ended. SIGKILL also ends a stopped process."""
    if is_alive(heartbeat):
        with suppress(ProcessLookupError):
            os.kill(heartbeat["pid"], number)


def is_alive(heartbeat: dict[str, Any]) -> bool:
    """Return whether the rank's process is alive. Compares start times, because a later process may get the same id."""
    return heartbeat["born"] is not None and start_ticks(heartbeat["pid"]) == heartbeat["born"]


def start_ticks(pid: int) -> str | None:
    """Return when a process started, in the kernel's clock ticks since boot; None if it has ended."""
    fields = _stat_fields(pid)
    return None if not fields or fields[0] in "ZX" else fields[19]


def process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process: R, S, D, T, ...; Z if it has ended."""
    return (_stat_fields(pid) or ["Z"])[0]


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (see proc(5)). The second, the name, may contain spaces and `)`."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
