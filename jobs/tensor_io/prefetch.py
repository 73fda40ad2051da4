"""Reads this node's share of the base weights into the page cache while packages are imported and ranks meet: that takes as long
as an eight-billion model's files on a fast disk, which would lie idle. Imports no torch."""

import os
import threading
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from conf.choices import AdapterKind, Backend, Init
from conf.mesh import copy_ranks
from conf.schema import Config
from jobs.distributed import host_memory
from jobs.distributed.rank import local_and_node_rank
from jobs.tensor_io import safetensors
from jobs.tensor_io.model_files import CHUNK_BYTES, READERS, files, find

Run = tuple[str, int, int]
"""File, and its bytes from here to there."""


def begin(config: Config) -> list[threading.Thread]:
    """Begin to read, on the first rank of a node; returns the threads that do, which nobody has to wait for.

    None where weights are drawn or come from a checkpoint, where they are not in a folder of this machine, or where the host has
    less than twice their memory free. What cannot be read is left to whoever needs it, and says so.
    """
    local_rank, node_rank = local_and_node_rank()
    runs = [] if local_rank else _runs(config, node_rank)
    if not runs or 2 * sum(last - first for _, first, last in runs) > host_memory.free_bytes():
        return []
    chunks: SimpleQueue[Run] = SimpleQueue()
    for path, first, last in runs:
        for at in range(first, last, CHUNK_BYTES):
            chunks.put((path, at, min(at + CHUNK_BYTES, last)))
    threads = [threading.Thread(target=_read, args=(chunks,), name="ahead", daemon=True) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    return threads


def _runs(config: Config, node_rank: int) -> list[Run]:
    drawn = config.model.init is not Init.pretrained
    if drawn or (config.adapter.kind is AdapterKind.none and any(Path(config.run_dir).glob("checkpoints/step-*"))):
        return []
    begin, end = share(config, node_rank)
    found = []
    with suppress(Exception):  # whatever is wrong with a folder: who needs its weights says it
        folder = find(config.model.source, config.model.revision, cached=True)
        for path in [folder / name for name in files(folder)] if folder else []:
            entries, data = safetensors.header(path)
            for first, last in (entry["data_offsets"] for entry in entries.values()):
                size = last - first
                found.append((str(path), data + first + int(begin * size), data + first + int(end * size)))
    return sorted(found)


def share(config: Config, node_rank: int) -> tuple[float, float]:
    """The part of every tensor that ranks of this node hold between them, from a fraction of it to another: blocks of rows under
    FSDP, runs of elements under ZeRO-3. (0, 0) where shared matrices cut it in other ways, over several nodes, and all of it
    where a copy ends, and the next begins, inside the node."""
    ranks, nodes, parallel = config.cluster.train.ranks_per_node, config.cluster.train.nodes, config.parallel
    holders = copy_ranks(parallel, nodes * ranks)
    if nodes == 1 or holders <= ranks or (parallel.backend is Backend.zero and parallel.zero_stage < 3):
        return 0.0, 1.0
    if parallel.tensor_ranks > 1:
        return 0.0, 0.0
    first = node_rank * ranks % holders
    return (0.0, 1.0) if first + ranks > holders else (first / holders, (first + ranks) / holders)


def _read(chunks: "SimpleQueue[Run]") -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with suppress(OSError, Empty):
        while True:
            path, first, last = chunks.get_nowait()
            with Path(path).open("rb", 0) as file:
                os.preadv(file.fileno(), [buffer[: last - first]], first)
