"""Stored weights: where each tensor lies in its safetensors file, whether it fits the model, and reading just a range of it."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from conf.errors import ConfigError, Problem
from jobs.distributed import heartbeat
from jobs.tensor_io.model_files import CHUNK_BYTES, READERS, files

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `begin` is the byte at which its data starts."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor: its elements from `begin` on, counted in the flattened whole, as many as `into` has."""

    shape: tuple[int, ...]
    begin: int
    into: torch.Tensor
    """Flat, contiguous, wherever and in whatever dtype the weight lives; nothing where this rank holds nothing of it."""
    trained: bool


@dataclass(frozen=True)
class _Piece:
    file: str
    begin: int
    dtype: torch.dtype
    into: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.into.numel() * self.dtype.itemsize


def catalogue(folder: Path, key: str, source: str) -> dict[str, Stored]:
    """Name -> place of every stored tensor. Raises ConfigError for files that are absent, cut off or of another format."""
    found: dict[str, Stored] = {}
    problems = []
    for name in files(folder):
        try:
            found |= _header(folder / name)
        except (OSError, ValueError, KeyError) as error:
            problems.append(Problem(key, source, f"{folder / name}: {error}; fetch the files again"))
    if problems:
        raise ConfigError(*problems)
    return found


def _header(path: Path) -> dict[str, Stored]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"is no safetensors file, or cut off at {size} bytes")
        described = json.loads(file.read(length))
    described.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in described.values()), default=0) + 8 + length
    if size < end:
        raise ValueError(f"is cut off: {size} of {end} bytes")
    return {
        name: Stored(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in described.items()
    }


def misfits(
    stored: Mapping[str, Stored], names: Mapping[str, list[str]], parts: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What hinders a model whose tensors have these shapes, each stored under one of these names; one sentence a tensor."""
    found = []
    for name, shape in parts.items():
        place = next((stored[other] for other in names[name] if other in stored), None)
        if place is None:
            found.append(f"{name} is in none of the files")
        elif place.dtype not in DTYPES:
            found.append(f"{name} in {place.file} is stored as {place.dtype}, which cannot be trained")
        elif place.shape != shape:
            found.append(f"{name} in {place.file} has the shape {list(place.shape)}, not {list(shape)}")
    known = {other for others in names.values() for other in others}
    found += [f"{name} in {stored[name].file} has no place in the model" for name in stored if name not in known]
    return found


def read(folder: Path, wanted: Iterable[tuple[Stored, Part]], show: bool) -> int:
    """Fill each part from its place in the files; returns the bytes read.

    Explicit reads, not a mapping of the file: page faults on network mounts took hours where reads took seconds
    (pytorch PR 175762), and mapped pages count as this process's memory.
    """
    pieces = sorted(
        (piece for place, part in wanted for piece in _pieces(place, part)), key=lambda piece: (piece.file, piece.begin)
    )
    pinned = any(piece.into.is_cuda for piece in pieces)
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(READERS):
        buffers.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned))
    with ExitStack() as stack:
        opened = {name: stack.enter_context((folder / name).open("rb", 0)) for name in {piece.file for piece in pieces}}
        bar = stack.enter_context(
            tqdm(
                total=sum(piece.nbytes for piece in pieces),
                desc="weights",
                unit="B",
                unit_scale=True,
                mininterval=1,
                disable=not show,
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(READERS))
        try:
            for count in pool.map(lambda piece: _fill(opened[piece.file].fileno(), piece, buffers), pieces):
                bar.update(count)
                heartbeat.alive()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return int(bar.total)


def alike(folder: Path, one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are equal, by a look at both ends: weights trained apart differ everywhere."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = min(one.nbytes, 4096)
    seen = []
    for place in (one, other):
        with (folder / place.file).open("rb", 0) as file:
            seen.append([os.pread(file.fileno(), size, place.begin + skip) for skip in (0, place.nbytes - size)])
    return seen[0] == seen[1]


def _pieces(place: Stored, part: Part) -> Iterator[_Piece]:
    """The part in runs of at most one chunk."""
    dtype = DTYPES[place.dtype]
    step = CHUNK_BYTES // dtype.itemsize
    for begin in range(0, part.into.numel(), step):
        yield _Piece(
            place.file, place.begin + (part.begin + begin) * dtype.itemsize, dtype, part.into[begin : begin + step]
        )


def _fill(file: int, piece: _Piece, buffers: "SimpleQueue[torch.Tensor]") -> int:
    buffer = buffers.get()
    try:
        target, done = memoryview(buffer.numpy()), 0
        while done < piece.nbytes:
            count = os.preadv(file, [target[done : piece.nbytes]], piece.begin + done)
            if count == 0:
                raise OSError(f"{piece.file} ends at byte {piece.begin + done}; it was longer a moment ago")
            done += count
        # over to the device first: the cast is quicker there
        piece.into.copy_(buffer[: piece.nbytes].view(piece.dtype).to(piece.into.device))
    finally:
        buffers.put(buffer)
    return piece.nbytes


def plain(name: str) -> str:
    """The name that a weight has in the files, from the one it has under adapters, recomputation or compilation."""
    return re.sub(r"^base_model\.model\.|\bbase_layer\.|\b_orig_mod\.|\b_checkpoint_wrapped_module\.", "", name)
