"""Where the elements of a stored tensor lie in files, as plain data, and which ranges of bytes make a block of it."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from jobs.tensor_io.dtypes import Dtype


@dataclass(frozen=True)
class Extent:
    """A rectangle of a tensor seen as rows of `Stored.width` elements; contiguous, row by row, in a file."""

    path: str
    offset: int
    """Byte in the file: of the first element, or of the archive around it."""
    row: int
    rows: int
    column: int = 0
    columns: int = 1
    archive: int = 0
    """Length in bytes of the torch.save archive that holds the elements; 0 where they lie bare."""
    skip: int = 0
    """Elements of the archive before the first of these."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it is on disk."""

    shape: tuple[int, ...]
    dtype: Dtype
    extents: tuple[Extent, ...]
    """Disjoint, sorted by row, together the whole tensor."""
    width: int = 1
    """Elements in a row of the extents; 1 where each of them is one run of the flat tensor."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """Elements that are contiguous in an extent, and the rectangle of the block that they fill."""

    extent: Extent
    element: int
    """Where they start, counted from `Extent.offset` or in the archive's tensor."""
    start: int
    """Where they start in the block; each next row is `Stored.width` further."""
    rows: int
    columns: int


def pieces(stored: Stored, start: int, stop: int) -> Iterator[Piece]:
    """What makes the flat elements `start` to `stop`: whole rows, or a part of one row."""
    width = stored.width
    first, last = start // width, -(-stop // width)
    left, right = (start - first * width, stop - first * width) if last - first == 1 else (0, width)
    for extent in _from(stored, first):
        if extent.row >= last:
            break
        top, bottom = max(first, extent.row), min(last, extent.row + extent.rows)
        west, east = max(left, extent.column), min(right, extent.column + extent.columns)
        if top < bottom and west < east:
            element = extent.skip + (top - extent.row) * extent.columns + west - extent.column
            yield Piece(extent, element, top * width + west - start, bottom - top, east - west)


def _from(stored: Stored, row: int) -> tuple[Extent, ...]:
    """The extents without those that end before `row`: thousands of ranks must not be looked at for each block."""
    if stored.width > 1:
        return stored.extents
    return stored.extents[max(0, bisect_right(stored.extents, row, key=lambda extent: extent.row) - 1) :]


def blocks(start: int, stop: int, width: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut the flat range into blocks of at most `limit` elements, each of whole rows or within one row."""
    while start < stop:
        into = start % width
        if into == 0 and width <= limit and stop - start >= width:
            end = start + min(limit, stop - start) // width * width
        else:
            end = min(stop, start - into + width, start + limit)
        yield start, end
        start = end


def rectangles(
    shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[int, list[list[tuple[int, int, int, int, int]]]]:
    """The width of a row, and for each box (starts, sizes) its rectangles: row, rows, column, columns, first element in the box.

    Sharding in one dimension gives runs of the flat tensor (width 1); in later dimensions rectangles.
    """
    split = max((_last_cut(shape, sizes) for _, sizes in boxes), default=0)
    if split == 0:
        rest = prod(shape[1:])
        return 1, [[(starts[0] * rest if shape else 0, prod(sizes), 0, 1, 0)] for starts, sizes in boxes]
    return prod(shape[split:]), [_rectangles(shape, starts, sizes, split) for starts, sizes in boxes]


def _last_cut(shape: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    return max((index for index, size in enumerate(sizes) if size != shape[index]), default=0)


def _rectangles(
    shape: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...], split: int
) -> list[tuple[int, int, int, int, int]]:
    """One rectangle where the dimensions before `split` are cut in the first only; else one for each index of the cut ones."""
    inner = prod(shape[split + 1 :])
    column, columns = starts[split] * inner, sizes[split] * inner
    cut = _last_cut(shape[:split], sizes[:split])
    run = prod(sizes[cut:split])  # rows that follow each other
    found = []
    for number in range(prod(sizes[:cut])):
        index, rest = [], number
        for size in reversed(sizes[:cut]):
            index.append(rest % size)
            rest //= size
        row = 0
        for dimension, inside in enumerate([*reversed(index), 0]):
            row = row * shape[dimension] + starts[dimension] + inside
        found.append((row * prod(shape[cut + 1 : split]), run, column, columns, number * run * columns))
    return found
