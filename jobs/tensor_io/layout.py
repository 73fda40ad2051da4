"""Where the elements of a stored tensor are in files, as plain data, and which byte ranges make up a block of it. Reads nothing."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from conf.errors import Problem, RunError
from jobs.tensor_io.dtypes import Dtype

MAX_RECTANGLES = 10**6
"""Most rectangles that one chunk may be cut into: each takes memory."""


@dataclass(frozen=True)
class Quantized:
    """What makes numbers of the codes in an extent; `jobs.tensor_io.dequantize` does it.

    The codes are matrices of (rows, columns), one after another, with one scale for each block. Blocks at the edges may be
    smaller than the others.
    """

    rows: int
    columns: int
    block: tuple[int, int]
    """Rows and columns that share a scale."""
    codes: Dtype
    """float8_e4m3fn: one number in a byte. uint8: two numbers of 4 bits (mxfp4), and each matrix is stored transposed."""
    scales: "StoredTensor"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.codes.name == "uint8" else 8

    @property
    def scale_grid(self) -> tuple[int, int]:
        """Scales of one matrix: their rows and columns."""
        return -(-self.rows // self.block[0]), -(-self.columns // self.block[1])


@dataclass(frozen=True)
class Extent:
    """A rectangle of a tensor whose elements are contiguous in a file, row by row.

    Rows and columns are those of the flat tensor viewed as (rows, `StoredTensor.width`).
    """

    path: str
    """The file. Only its name when base weights are loaded: nodes may keep the model in different folders."""
    offset: int
    """Byte in the file at which the elements begin, or the torch.save archive that holds them."""
    row: int
    rows: int
    column: int = 0
    columns: int = 1
    archive: int = 0
    """Length in bytes of the torch.save archive that holds the elements; 0 if they are not in an archive."""
    skip: int = 0
    """Elements in the archive before the first element of this extent."""
    quantized: Quantized | None = None
    """How its numbers are stored, if they are not stored as they are used."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: Dtype
    extents: tuple[Extent, ...]
    """Disjoint and sorted by row; together they are the whole tensor."""
    width: int = 1
    """Elements per row of the extents; 1 if every extent is one run of the flat tensor."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of its elements in files; fewer than `nbytes` if they are quantized."""
        if all(extent.quantized is None for extent in self.extents):
            return self.nbytes
        bits = [extent.quantized.bits if extent.quantized else 8 * self.dtype.itemsize for extent in self.extents]
        return sum(extent.rows * extent.columns * size // 8 for extent, size in zip(self.extents, bits, strict=True))

    @property
    def is_quantized(self) -> bool:
        return any(extent.quantized is not None for extent in self.extents)


@dataclass(frozen=True)
class Piece:
    """Elements that are contiguous in an extent, and the rectangle that they fill in the block that is read."""

    extent: Extent
    element: int
    """First element, counted from `Extent.offset`, or from the first element of the archive's tensor."""
    start: int
    """First element in the block; each following row is `StoredTensor.width` elements further."""
    rows: int
    columns: int


def pieces(stored: StoredTensor, start: int, stop: int) -> Iterator[Piece]:
    """The pieces that make up the flat elements `start` to `stop`, which are whole rows or a part of one row."""
    width = stored.width
    first, last = start // width, -(-stop // width)
    left, right = (start - first * width, stop - first * width) if last - first == 1 else (0, width)
    for extent in _extents_from(stored, first):
        if extent.row >= last:
            break
        top, bottom = max(first, extent.row), min(last, extent.row + extent.rows)
        west, east = max(left, extent.column), min(right, extent.column + extent.columns)
        if top < bottom and west < east:
            element = extent.skip + (top - extent.row) * extent.columns + west - extent.column
            yield Piece(extent, element, top * width + west - start, bottom - top, east - west)


def _extents_from(stored: StoredTensor, row: int) -> tuple[Extent, ...]:
    """The extents that do not end before `row`. A binary search, because thousands of ranks give thousands of extents."""
    if stored.width > 1:
        return stored.extents
    return stored.extents[max(0, bisect_right(stored.extents, row, key=lambda extent: extent.row) - 1) :]


def blocks(start: int, stop: int, width: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut the flat range into (start, stop) blocks of at most `limit` elements, each of whole rows or within one row."""
    while start < stop:
        column = start % width
        if column == 0 and width <= limit and stop - start >= width:
            end = start + min(limit, stop - start) // width * width
        else:
            end = min(stop, start - column + width, start + limit)
        yield start, end
        start = end


class Rectangle(NamedTuple):
    """A part of a chunk that is contiguous both in the chunk and, row by row, in the tensor."""

    row: int
    rows: int
    column: int
    columns: int
    element: int
    """First element of the rectangle, counted in the flat chunk."""


class Chunk(NamedTuple):
    """A box of a tensor: its first index and its size in every dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]


def rectangles(shape: tuple[int, ...], chunks: list[Chunk]) -> tuple[int, list[list[Rectangle]]]:
    """Elements per row, and the rectangles of each chunk. Raises RunError for a chunk of more than MAX_RECTANGLES.

    Chunks that are cut in the first dimension only are runs of the flat tensor: the width is 1. Otherwise a row has the
    elements from the last dimension that is cut in any chunk. Example: a 4 x 6 tensor cut into two halves of 4 x 3 gives width 6
    and Rectangle(row=0, rows=4, column=0 or 3, columns=3, element=0).
    """
    split = max((_last_cut_dimension(shape, chunk.sizes) for chunk in chunks), default=0)
    if split == 0:
        stride = prod(shape[1:])
        return 1, [[Rectangle(starts[0] * stride if shape else 0, prod(sizes), 0, 1, 0)] for starts, sizes in chunks]
    return prod(shape[split:]), [_rectangles_of_chunk(shape, chunk, split) for chunk in chunks]


def _last_cut_dimension(shape: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    return max((index for index, size in enumerate(sizes) if size != shape[index]), default=0)


def _rectangles_of_chunk(shape: tuple[int, ...], chunk: Chunk, split: int) -> list[Rectangle]:
    """One rectangle if only the first dimension before `split` is cut; else one for each index of the dimensions before the cut."""
    starts, sizes = chunk
    inner = prod(shape[split + 1 :])
    column, columns = starts[split] * inner, sizes[split] * inner
    cut = _last_cut_dimension(shape[:split], sizes[:split])
    rows = prod(sizes[cut:split])  # rows that follow each other in the tensor
    rectangles = []
    if (count := prod(sizes[:cut])) > MAX_RECTANGLES:
        message = f"has a tensor of shape {list(shape)} in {count} runs: save it with fewer dimensions cut"
        raise RunError(Problem("checkpoint", None, message))
    for number in range(count):
        # `number` as an index of the dimensions before `cut`, inside the chunk
        reversed_index, rest = [], number
        for size in reversed(sizes[:cut]):
            reversed_index.append(rest % size)
            rest //= size
        row = 0
        for dimension, inside in enumerate([*reversed(reversed_index), 0]):
            row = row * shape[dimension] + starts[dimension] + inside
        first_row = row * prod(shape[cut + 1 : split])
        rectangles.append(Rectangle(first_row, rows, column, columns, number * rows * columns))
    return rectangles
