"""Training's state from a checkpoint of one layout into an engine of another: a rank reads just what it holds of each tensor."""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from conf.choices import Backend
from conf.errors import Problem, RunError
from jobs.backends import Engine
from jobs.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from jobs.tensor_io import dcp, deepspeed
from jobs.tensor_io.dtypes import as_bytes
from jobs.tensor_io.layout import Stored, blocks
from jobs.tensor_io.model_files import CHUNK_BYTES, READERS
from jobs.tensor_io.reader import Files, Reader
from jobs.tensor_io.slices import Part, plain

WEIGHT = "weight"
"""Kind of the fp32 masters; the other kinds are what the optimizer calls its state: exp_avg, exp_avg_sq, step."""

Kinds = dict[str, dict[str, Stored]]
"""Plain name of a trained weight -> kind -> where it is stored."""
Held = dict[str, dict[str, Part]]
"""Plain name of a trained weight -> kind -> what this rank holds of it."""


def load(backend: ModuleType, engine: Engine, folder: Path, written_by: Backend) -> int:
    """Fill the engine's masters and optimizer state from `folder`; returns the bytes this rank read. All ranks call this.

    Nothing is written and no rank has a whole tensor: reads go in pieces of 16 MiB from the old shards to their place.
    Raises RunError, on all ranks, for a tensor that is missing, of another shape, or cut in a way that has no elements.
    """
    saved = broadcast_from_rank0(lambda: stored(folder, written_by))
    held = backend.held(engine)
    raise_on_all_ranks(lambda: _check(folder, saved, held))
    count = raise_on_all_ranks(lambda: _fill(saved, held))
    backend.filled(engine)
    return count


def stored(folder: Path, written_by: Backend) -> Kinds:
    """Where a checkpoint has the masters and the optimizer's state of each trained weight. Raises RunError where it is damaged."""
    return _zero(folder) if written_by is Backend.zero else _dcp(folder)


def _dcp(folder: Path) -> Kinds:
    found: Kinds = {}
    for key, place in dcp.tensors(folder).items():
        if state := re.fullmatch(r"optimizer\.state\.(.+)\.([^.]+)", key):
            found.setdefault(plain(state[1]), {})[state[2]] = place
        elif key.startswith("model."):
            found.setdefault(plain(key.removeprefix("model.")), {})[WEIGHT] = place
    # a tied weight stands there by both names, and has its state by the first
    return {name: kinds for name, kinds in found.items() if len(kinds) > 1}


def _zero(folder: Path) -> Kinds:
    name = (folder / "latest").read_text(encoding="utf-8").strip()  # written beside DeepSpeed's own folder
    masters, states = deepspeed.tensors(folder / name), deepspeed.optimizer_state(folder / name)
    return {plain(key): {WEIGHT: masters[key], **kinds} for key, kinds in states.items()}


def _check(folder: Path, saved: Kinds, held: Held) -> None:
    problems = []
    for name, parts in held.items():
        there = saved.get(name, {})
        for kind in sorted(parts.keys() ^ there.keys()):
            said = "is not in it" if kind in parts else "is in it, but not in this training"
            problems.append(Problem("checkpoint", folder, f"{kind} of {name} {said}: resume with the layout it is of"))
        for kind in parts.keys() & there.keys():
            if (old := there[kind].shape) != (new := parts[kind].shape):
                said = f"{kind} of {name} has the shape {list(old)}, not {list(new)}: resume with the layout it is of"
                problems.append(Problem("checkpoint", folder, said))
    if problems:
        raise RunError(*problems[:10])


def _fill(saved: Kinds, held: Held) -> int:
    files, own = Files(), threading.local()

    def one(piece: tuple[Stored, int, torch.Tensor]) -> int:
        place, start, into = piece
        if not hasattr(own, "reader"):
            own.reader = Reader(files)
        block = torch.empty(into.numel(), dtype=place.dtype.torch)
        own.reader.fill(place, start, as_bytes(block))
        into.copy_(block)
        return block.nbytes

    try:
        with torch.no_grad(), ThreadPoolExecutor(READERS) as pool:
            return sum(pool.map(one, _pieces(saved, held)))
    finally:
        files.close()


def _pieces(saved: Kinds, held: Held) -> Iterator[tuple[Stored, int, torch.Tensor]]:
    """(where, first element, room for it) in pieces of at most a chunk, name by name."""
    for name, parts in held.items():
        for kind, part in parts.items():
            place, end = saved[name][kind], part.begin + part.into.numel()
            for start, stop in blocks(part.begin, end, place.width, CHUNK_BYTES // place.dtype.itemsize):
                yield place, start, part.into[start - part.begin : stop - part.begin]
