"""Starts real ranks for tests: a function in several processes over Gloo, or a whole run through launch.py on this machine."""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

CLONE = Path(__file__).resolve().parents[2]
multiprocessing.set_forkserver_preload(["tests.jobs.preloaded"])


def run(*words: str, code: int = 0) -> str:
    """Run `python launch.py words...` and return its output. If it exits with another code, the test fails and shows the output."""
    done = subprocess.run(
        [sys.executable, CLONE / "launch.py", *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + (done.stderr if code else "")


def spawn(function: Callable[..., None], world_size: int, *arguments: Any, start_method: str = "forkserver") -> None:
    """Call function(rank, *arguments) on `world_size` ranks. An error on any of them is raised here.

    `start_method="spawn"` takes seconds longer, and is needed for GPUs: CUDA does not survive a fork.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported, once for all ranks of all tests
    mp.start_processes(
        _rank, args=(os.getpid(), function, world_size, port, arguments), nprocs=world_size, start_method=start_method
    )


def _rank(
    rank: int, test: int, function: Callable[..., None], world_size: int, port: int, arguments: tuple[Any, ...]
) -> None:
    for number in (1, 2):  # the fork server has the output of the test that started it: use this test's
        os.dup2(os.open(f"/proc/{test}/fd/{number}", os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1",
    )  # fmt: skip
    function(rank, *arguments)
