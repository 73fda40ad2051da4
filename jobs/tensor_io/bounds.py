"""Checks that each tensor of a checkpoint lies in its folder and in its files, and that its parts cover it exactly once."""

from bisect import bisect_left, insort
from math import prod
from pathlib import Path

from conf.errors import Problem, RunError
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import Extent, StoredTensor
from jobs.tensor_io.untrusted import check_inside

MAX_ELEMENTS = 2**60


def check(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise RunError for a tensor that would be read from elsewhere, or of which parts are missing or stored twice.

    Nothing that a file says about itself is trusted: what was checked here takes no more memory than the files have bytes.
    """
    sizes: dict[str, int] = {}
    for name, stored in tensors.items():
        if not isinstance(name, str):
            raise RunError(Problem("checkpoint", folder, "names a tensor with something else than text: save it again"))
        if reason := _what_is_wrong(stored):
            raise RunError(Problem("checkpoint", folder, f"{name:.200} {reason}: save it again, or merge another step"))
        for extent in stored.extents:
            if extent.path not in sizes:
                check_inside(Path(extent.path), folder)
                sizes[extent.path] = Path(extent.path).stat().st_size
            _check_in_file(name, stored, extent, sizes[extent.path])


def _what_is_wrong(stored: StoredTensor) -> str:
    """Why a tensor cannot be read; empty if it can."""
    if not isinstance(stored.dtype, Dtype) or not stored.dtype.itemsize:
        return "has a dtype that cannot be merged"
    if any(type(size) is not int or size < 0 for size in stored.shape) or prod(stored.shape) > MAX_ELEMENTS:
        return "has a shape that cannot be"
    return "" if _covered_once(stored) else "has parts that are missing or stored twice"


def _covered_once(stored: StoredTensor) -> bool:
    """Whether the extents have as many elements as the tensor, lie in it and do not overlap."""
    rows = prod(stored.shape) // max(1, stored.width)
    extents = [extent for extent in stored.extents if extent.rows * extent.columns]
    if sum(extent.rows * extent.columns for extent in extents) != prod(stored.shape):
        return False
    if any(min(extent.row, extent.rows, extent.column, extent.columns, extent.skip) < 0 for extent in extents):
        return False
    if any(extent.row + extent.rows > rows or extent.column + extent.columns > stored.width for extent in extents):
        return False
    return not _overlap(extents)


def _overlap(extents: list[Extent]) -> bool:
    """Whether two rectangles share an element. Goes down the rows, and keeps the columns that are taken, sorted."""
    borders = sorted(
        [(extent.row + extent.rows, 0, extent) for extent in extents] + [(extent.row, 1, extent) for extent in extents],
        key=lambda item: item[:2],
    )
    taken = list[tuple[int, int]]()
    for _, begins, extent in borders:
        span = (extent.column, extent.column + extent.columns)
        place = bisect_left(taken, span)
        if not begins:
            if taken[place : place + 1] == [span]:
                del taken[place]
            continue
        before, after = taken[place - 1 : place] if place else [], taken[place : place + 1]
        if (before and before[0][1] > span[0]) or (after and after[0][0] < span[1]):
            return True
        insort(taken, span)
    return False


def _check_in_file(name: str, stored: StoredTensor, extent: Extent, size: int) -> None:
    """Raise RunError unless an extent lies in its file, which has `size` bytes."""
    nbytes = extent.archive or (extent.rows * extent.columns + extent.skip) * stored.dtype.itemsize
    needed = (extent.rows * extent.columns + extent.skip) * stored.dtype.itemsize
    if extent.offset < 0 or extent.archive < 0 or extent.offset + nbytes > size or needed > nbytes:
        message = f"is cut short, or not what the checkpoint says: {name:.200} does not fit into its {size} bytes"
        raise RunError(Problem("checkpoint", extent.path, f"{message}; copy it again, or merge another step"))
