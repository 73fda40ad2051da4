"""Reads this node's share of the base weights into the page cache while Python packages are imported and the ranks connect.

Importing and connecting takes as long as reading the files of an 8B model from a fast disk, which would otherwise be idle.
Imports no torch.
"""

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
from jobs.tensor_io.model_files import CHUNK_BYTES, READERS, find_or_download, weight_files

ByteRange = tuple[str, int, int]
"""Path, first byte, last byte + 1."""


def begin(config: Config) -> list[threading.Thread]:
    """Start reading, on the first rank of a node. Returns the threads; nobody has to wait for them.

    There are none if the weights are random or come from a checkpoint, if the model is not on this machine, or if the host has
    less than twice the needed memory free. Read errors are ignored here: the code that needs the weights reports them.
    """
    local_rank, node_rank = local_and_node_rank()
    ranges = [] if local_rank else _ranges(config, node_rank)
    if not ranges or 2 * sum(last - first for _, first, last in ranges) > host_memory.free_bytes():
        return []
    chunks: SimpleQueue[ByteRange] = SimpleQueue()
    for path, first, last in ranges:
        for start in range(first, last, CHUNK_BYTES):
            chunks.put((path, start, min(start + CHUNK_BYTES, last)))
    threads = [threading.Thread(target=_read, args=(chunks,), name="prefetch", daemon=True) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    return threads


def _ranges(config: Config, node_rank: int) -> list[ByteRange]:
    """The bytes that this node needs, sorted by file and offset."""
    random_weights = config.model.init is not Init.pretrained
    has_checkpoint = any(Path(config.run_dir).glob("checkpoints/step-*"))
    if random_weights or (config.adapter.kind is AdapterKind.none and has_checkpoint):
        return []
    begin, end = node_fractions(config, node_rank)
    ranges = []
    with suppress(Exception):  # whatever is wrong with the files, loading reports it with a better message
        folder = find_or_download(config.model.source, config.model.revision, cached=True)
        for path in [folder / name for name in weight_files(folder)] if folder else []:
            header = safetensors.read_header(path)
            for first, last in (entry["data_offsets"] for entry in header.entries.values()):
                size, start = last - first, header.data_start + first
                ranges.append((str(path), start + int(begin * size), start + int(end * size)))
    return sorted(ranges)


def node_fractions(config: Config, node_rank: int) -> tuple[float, float]:
    """The part of every tensor that the ranks of this node hold, as two fractions of its bytes: (first, last).

    FSDP gives a node a block of rows, ZeRO-3 a run of elements. With tensor parallelism over several nodes the parts are not
    contiguous, so nothing is read: (0, 0). If one copy of the model ends inside the node and the next begins, the node needs
    everything: (0, 1).
    """
    ranks, nodes, parallel = config.cluster.train.ranks_per_node, config.cluster.train.nodes, config.parallel
    ranks_per_copy = copy_ranks(parallel, nodes * ranks)
    if nodes == 1 or ranks_per_copy <= ranks or (parallel.backend is Backend.zero and parallel.zero_stage < 3):
        return 0.0, 1.0
    if parallel.tensor_ranks > 1:
        return 0.0, 0.0
    first = node_rank * ranks % ranks_per_copy
    if first + ranks > ranks_per_copy:
        return 0.0, 1.0
    return first / ranks_per_copy, (first + ranks) / ranks_per_copy


def _read(chunks: "SimpleQueue[ByteRange]") -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with suppress(OSError, Empty):
        while True:
            path, first, last = chunks.get_nowait()
            with Path(path).open("rb", 0) as file:
                os.preadv(file.fileno(), [buffer[: last - first]], first)
