"""Loads a checkpoint of one layout into an engine of another: each rank reads only its own part of each tensor."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from conf import choices
from conf.errors import Problem, RunError
from jobs.backends import Backend, Engine
from jobs.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from jobs.tensor_io import dcp, deepspeed
from jobs.tensor_io.dtypes import as_bytes
from jobs.tensor_io.layout import StoredTensor, blocks
from jobs.tensor_io.model_files import CHUNK_BYTES, READERS
from jobs.tensor_io.reader import OpenFiles, Reader
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers

WEIGHT = "weight"
"""Kind of the fp32 master weights. The other kinds are the optimizer's names for its state: exp_avg, exp_avg_sq, step."""

StoredState = dict[str, dict[str, StoredTensor]]
"""Name of a trained weight (without wrappers) -> kind -> where the checkpoint stores it."""
RankState = dict[str, dict[str, TensorPart]]
"""Name of a trained weight (without wrappers) -> kind -> this rank's part of it, to be filled."""


def load(backend: Backend, engine: Engine, folder: Path, written_by: choices.Backend) -> int:
    """Fill the engine's masters and optimizer state from `folder`; returns the bytes this rank read. All ranks call this.

    Nothing is written to disk, and no rank has a whole tensor in memory: blocks of 16 MiB go from the old shards straight into
    the new ones. Raises RunError, on all ranks, for a tensor that is missing or has another shape.
    """
    saved = broadcast_from_rank0(lambda: stored(folder, written_by))
    parts = backend.local_state(engine)
    raise_on_all_ranks(lambda: _check(folder, saved, parts))
    read_bytes = raise_on_all_ranks(lambda: _fill(saved, parts))
    backend.apply_local_state(engine)
    return read_bytes


def stored(folder: Path, written_by: choices.Backend) -> StoredState:
    """Where a checkpoint stores master and optimizer state of each trained weight. Raises RunError if it is damaged."""
    return _zero(folder) if written_by is choices.Backend.zero else _dcp(folder)


def _dcp(folder: Path) -> StoredState:
    weights: StoredState = {}
    for key, tensor in dcp.find_tensors(folder).items():
        if state := re.fullmatch(r"optimizer\.state\.(.+)\.([^.]+)", key):
            weights.setdefault(without_wrappers(state[1]), {})[state[2]] = tensor
        elif key.startswith("model."):
            weights.setdefault(without_wrappers(key.removeprefix("model.")), {})[WEIGHT] = tensor
    # A tied weight is stored under both of its names, its optimizer state only under the first: drop the name without state
    return {name: kinds for name, kinds in weights.items() if len(kinds) > 1}


def _zero(folder: Path) -> StoredState:
    name = (folder / "latest").read_text(encoding="utf-8").strip()  # `zero.save` writes it beside DeepSpeed's folder
    masters, states = deepspeed.find_tensors(folder / name), deepspeed.find_optimizer_state(folder / name)
    return {without_wrappers(key): {WEIGHT: masters[key], **kinds} for key, kinds in states.items()}


def _check(folder: Path, saved: StoredState, parts: RankState) -> None:
    problems = []
    for name, kinds in parts.items():
        stored_kinds = saved.get(name, {})
        for kind in sorted(kinds.keys() ^ stored_kinds.keys()):
            difference = "is missing" if kind in kinds else "is stored, but this training does not have it"
            message = f"{kind} of {name} {difference}: resume with the layout that wrote it"
            problems.append(Problem("checkpoint", folder, message))
        for kind in kinds.keys() & stored_kinds.keys():
            if (old := stored_kinds[kind].shape) != (new := kinds[kind].shape):
                message = (
                    f"{kind} of {name} has the shape {list(old)}, not {list(new)}: resume with the layout that wrote it"
                )
                problems.append(Problem("checkpoint", folder, message))
    if problems:
        raise RunError(*problems[:10])


def _fill(saved: StoredState, parts: RankState) -> int:
    """Read this rank's parts with several threads; returns the bytes read."""
    files, of_thread = OpenFiles(), threading.local()

    def read(block: tuple[StoredTensor, int, torch.Tensor]) -> int:
        tensor, start, destination = block
        if not hasattr(of_thread, "reader"):  # a Reader has buffers, so each thread needs its own
            of_thread.reader = Reader(files)
        buffer = torch.empty(destination.numel(), dtype=tensor.dtype.torch)
        of_thread.reader.fill(tensor, start, as_bytes(buffer))
        destination.copy_(buffer)
        return buffer.nbytes

    try:
        with torch.no_grad(), ThreadPoolExecutor(READERS) as pool:
            return sum(pool.map(read, _blocks(saved, parts)))
    finally:
        files.close()


def _blocks(saved: StoredState, parts: RankState) -> Iterator[tuple[StoredTensor, int, torch.Tensor]]:
    """(stored tensor, first element, memory to fill) in blocks of at most CHUNK_BYTES, weight by weight."""
    for name, kinds in parts.items():
        for kind, part in kinds.items():
            tensor, end = saved[name][kind], part.begin + part.destination.numel()
            for start, stop in blocks(part.begin, end, tensor.width, CHUNK_BYTES // tensor.dtype.itemsize):
                yield tensor, start, part.destination[start - part.begin : stop - part.begin]
