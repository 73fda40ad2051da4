"""Loads base weights: finds each tensor in the safetensors files, checks it against the model, and reads a rank's part of it."""

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
from jobs.tensor_io.dequantize import Dequantizer, steps
from jobs.tensor_io.layout import Extent, StoredTensor, pieces
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
    """At most CHUNK_BYTES of a file, or the codes of at most an expert, and where they go."""

    extent: Extent
    element: int
    """First element in the extent."""
    dtype: torch.dtype
    destination: torch.Tensor

    @property
    def file(self) -> str:
        return self.extent.path

    @property
    def files(self) -> set[str]:
        """The file, and that of the scales."""
        scales = self.extent.quantized.scales.extents if self.extent.quantized else ()
        return {self.extent.path, *(extent.path for extent in scales)}

    @property
    def offset(self) -> int:
        return self.extent.offset + self.element * self._bits // 8

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self._bits // 8

    @property
    def _bits(self) -> int:
        return self.extent.quantized.bits if self.extent.quantized else 8 * self.dtype.itemsize


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
        names = {name for item in file_ranges for name in item.files}
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
            descriptors = {name: file.fileno() for name, file in opened.items()}
            for count in pool.map(lambda item: _fill(descriptors, item, buffers), file_ranges):
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
    count = min(one.numel, COMPARED_BYTES // one.dtype.itemsize)
    ends = []
    for tensor in (one, other):
        parts = [torch.empty(count, dtype=one.dtype.torch) for _ in range(2)]
        begins = (0, tensor.numel - count)
        wanted = [(tensor, TensorPart(one.shape, *pair, False)) for pair in zip(begins, parts, strict=True)]
        read(folder, wanted, show=False)
        ends.append(torch.cat(parts).view(torch.uint8))
    return torch.equal(*ends)


def _file(stored: StoredTensor) -> str:
    """The file of a tensor, or of the first part of one that is stored in parts."""
    return stored.extents[0].path


def _file_ranges(stored: StoredTensor, part: TensorPart) -> Iterator[_FileRange]:
    """The ranges of the files that hold a part. Each extent is one run of the flat tensor, as in safetensors files."""
    dtype = stored.dtype.torch
    for piece in pieces(stored, part.begin, part.begin + part.destination.numel()):
        stop, element = piece.element + piece.rows, piece.element
        step = _range_elements(piece.extent, stored.dtype.itemsize)
        while element < stop:
            end = min(stop, (element // step + 1) * step)
            begin = piece.start + element - piece.element
            yield _FileRange(piece.extent, element, dtype, part.destination[begin : begin + end - element])
            element = end


def _range_elements(extent: Extent, itemsize: int) -> int:
    """Elements that are read at once: a chunk; of mxfp4 an expert, the codes of which are in another order."""
    if extent.quantized and extent.quantized.bits == 4:
        return extent.quantized.rows * extent.quantized.columns
    return CHUNK_BYTES // itemsize


def _fill(descriptors: Mapping[str, int], file_range: _FileRange, buffers: "SimpleQueue[torch.Tensor]") -> int:
    if file_range.extent.quantized:
        return _fill_dequantized(descriptors, file_range)
    buffer = buffers.get()
    try:
        descriptor, view = descriptors[file_range.file], buffer.numpy()[: file_range.nbytes].data
        read_range(descriptor, file_range.file, file_range.offset, view)
        # first to the device, then to the dtype: the cast is faster there
        file_range.destination.copy_(
            buffer[: file_range.nbytes].view(file_range.dtype).to(file_range.destination.device)
        )
    finally:
        buffers.put(buffer)
    return file_range.nbytes


def _fill_dequantized(descriptors: Mapping[str, int], file_range: _FileRange) -> int:
    dequantizer = Dequantizer(lambda path, offset, target: read_range(descriptors[path], path, offset, target.data))
    first = file_range.element
    for start, stop in steps(file_range.extent, first, first + file_range.destination.numel()):
        numbers = dequantizer.read(file_range.extent, start, stop)
        file_range.destination[start - first : stop - first].copy_(numbers)
    return file_range.nbytes
