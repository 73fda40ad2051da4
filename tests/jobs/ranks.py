"""Runs a function on several real ranks over Gloo, each a process of its own."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def spawn(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call function(rank, *arguments) on every rank; an assertion that fails on any of them fails here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(function, world_size, port, arguments), nprocs=world_size)


def _rank(rank: int, function: Callable[..., None], world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1",
    )  # fmt: skip
    function(rank, *arguments)
