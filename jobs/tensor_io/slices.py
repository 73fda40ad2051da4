"""Loads base weights: finds each tensor in the safetensors files, checks it against the model, and reads a rank's part of it."""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from conf.errors import ConfigError, Problem
from jobs.distributed import heartbeat
from jobs.tensor_io import safetensors
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.model_files import CHUNK_BYTES, READERS, weight_files
from jobs.tensor_io.reader import read_range

COMPARED_BYTES = 4096
"""Bytes at each end of two tied weights that `probably_equal` compares."""


@dataclass(frozen=True)
class TensorPart:
    """The part of a tensor that a rank holds: as many elements as `destination` has, from the flat element `begin` on."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    begin: int
    destination: torch.Tensor
    """Flat and contiguous, on any device and in any dtype; empty if this rank holds nothing of the tensor."""
    trained: bool

    def copy_from(self, whole: torch.Tensor) -> None:
        """Fill this part from the whole tensor, of shape `shape`."""
        self.destination.copy_(whole.reshape(-1)[self.begin : self.begin + self.destination.numel()])


@dataclass(frozen=True)
class _FileRange:
    """At most CHUNK_BYTES of a file, and where they go."""

    file: str
    offset: int
    dtype: torch.dtype
    destination: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.dtype.itemsize


def find_tensors(folder: Path, key: str, source: str) -> dict[str, StoredTensor]:
    """Every stored tensor by its name, with paths relative to `folder`: other nodes may have the files in another folder.

    Raises ConfigError, for `key`=`source`, that names every file that is missing, cut off or not in this format.
    """
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for name in weight_files(folder):
        try:
            tensors |= safetensors.tensors_of_file(folder / name, name)
        except (OSError, ValueError, KeyError) as error:
            problems.append(Problem(key, source, f"{folder / name}: {error}; fetch the files again"))
    if problems:
        raise ConfigError(*problems)
    return tensors


def mismatches(
    stored: Mapping[str, StoredTensor], names: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Why these files do not fit the model, one sentence per tensor; empty if they fit.

    `shapes` are those that the model needs, by its own names; `names` gives the names under which each may be stored.
    """
    problems = []
    for name, shape in shapes.items():
        tensor = next((stored[candidate] for candidate in names[name] if candidate in stored), None)
        if tensor is None:
            problems.append(f"{name} is in none of the files")
        elif not tensor.dtype.itemsize:
            problems.append(f"{name} in {_file(tensor)} is stored as {tensor.dtype.name}, which cannot be trained")
        elif tensor.shape != shape:
            problems.append(f"{name} in {_file(tensor)} has the shape {list(tensor.shape)}, not {list(shape)}")
    known = {candidate for candidates in names.values() for candidate in candidates}
    problems += [f"{name} in {_file(stored[name])} is not in the model" for name in stored if name not in known]
    return problems


def read(folder: Path, wanted: Iterable[tuple[StoredTensor, TensorPart]], show: bool) -> int:
    """Fill each part from the files in `folder`; returns the bytes read. `show` draws a progress bar. Raises OSError.

    Uses explicit reads, not a mapping of the file: page faults on network mounts took hours where reads took seconds
    (pytorch PR 175762), and mapped pages count as memory of this process.
    """
    file_ranges = sorted(
        (item for stored, part in wanted for item in _file_ranges(stored, part)),
        key=lambda item: (item.file, item.offset),
    )
    pinned = any(file_range.destination.is_cuda for file_range in file_ranges)
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(READERS):
        buffers.put(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned))
    with ExitStack() as stack:
        names = {item.file for item in file_ranges}
        opened = {name: stack.enter_context((folder / name).open("rb", 0)) for name in names}
        bar = stack.enter_context(
            tqdm(
                total=sum(file_range.nbytes for file_range in file_ranges),
                desc="weights",
                unit="B",
                unit_scale=True,
                mininterval=1,
                disable=not show,
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(READERS))
        try:
            for count in pool.map(lambda item: _fill(opened[item.file].fileno(), item, buffers), file_ranges):
                bar.update(count)
                heartbeat.refresh()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise leaving the pool would read everything first
            raise
        return int(bar.total)


def probably_equal(folder: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, judged by both ends: weights that were trained apart differ everywhere."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = min(one.nbytes, COMPARED_BYTES)
    ends = []
    for tensor in (one, other):
        offset = tensor.extents[0].offset
        with (folder / _file(tensor)).open("rb", 0) as file:
            ends.append([os.pread(file.fileno(), size, offset + skip) for skip in (0, tensor.nbytes - size)])
    return ends[0] == ends[1]


def _file(stored: StoredTensor) -> str:
    """A tensor of a safetensors file has one extent."""
    return stored.extents[0].path


def _file_ranges(stored: StoredTensor, part: TensorPart) -> Iterator[_FileRange]:
    (extent,), size = stored.extents, stored.dtype.itemsize
    step = CHUNK_BYTES // size
    for begin in range(0, part.destination.numel(), step):
        offset = extent.offset + (part.begin + begin) * size
        yield _FileRange(extent.path, offset, stored.dtype.torch, part.destination[begin : begin + step])


def _fill(descriptor: int, file_range: _FileRange, buffers: "SimpleQueue[torch.Tensor]") -> int:
    buffer = buffers.get()
    try:
        read_range(descriptor, file_range.file, file_range.offset, buffer.numpy()[: file_range.nbytes].data)
        # first to the device, then to the dtype: the cast is faster there
        file_range.destination.copy_(
            buffer[: file_range.nbytes].view(file_range.dtype).to(file_range.destination.device)
        )
    finally:
        buffers.put(buffer)
    return file_range.nbytes
