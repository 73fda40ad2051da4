"""Open files, and the blocks of stored tensors that are read from them."""

import os
import threading
from collections.abc import Callable

import numpy as np

from conf.errors import Problem, RunError
from jobs.tensor_io import safe_pickle
from jobs.tensor_io.layout import Extent, Piece, Stored, pieces

CHUNK = 4 * 2**20
"""Bytes a read, at most: few enough that they are still in the processor's cache when they are cast, summed up and written
(a quarter less of its time than with 16 MiB). Explicit reads, never mmap: on network file systems a page fault at a time takes
hours."""


Check = Callable[[str, int, int], None]
"""(path, offset, bytes) that are about to be read; raises RunError where they are not what they should be."""


class Files:
    """Open descriptors by path, shared by the workers: opening is a round trip on a network file system."""

    def __init__(self, check: Check | None = None) -> None:
        self.check = check
        self._open: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def __call__(self, path: str, flags: int = os.O_RDONLY) -> int:
        with self._lock:
            if (path, flags) not in self._open:
                try:
                    self._open[path, flags] = os.open(path, flags)
                except OSError as error:
                    raise RunError(Problem("file", path, f"cannot be opened: {error.strerror}")) from error
            return self._open[path, flags]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Reader:
    """One worker's way to blocks of stored tensors."""

    def __init__(self, files: Files, *, once: bool = False) -> None:
        self.files = files
        self.once = once
        """Whether what is read is then let go of by the page cache, which else grows by the size of the model; a fresh page also
        costs more than the copy into it."""
        self._scratch = np.empty(0, np.uint8)
        self._begins: dict[tuple[str, int], int] = {}

    def fill(self, stored: Stored, start: int, block: np.ndarray) -> None:
        """Read the flat elements from `start` on into the bytes of `block`, as they are stored."""
        size = stored.dtype.itemsize
        for piece in pieces(stored, start, start + block.size // size):
            room, count = block[piece.start * size :], piece.rows * piece.columns * size
            if piece.rows == 1 or piece.columns == stored.width:
                self._read(stored, piece, room[:count])
            else:
                part = self._space(count)
                self._read(stored, piece, part)
                shape, strides = (piece.rows, piece.columns * size), (stored.width * size, 1)
                np.lib.stride_tricks.as_strided(room, shape, strides)[:] = part.reshape(shape)

    def _read(self, stored: Stored, piece: Piece, part: np.ndarray) -> None:
        extent = piece.extent
        begin = self._begin(stored, extent) if extent.archive else extent.offset
        descriptor, offset = self.files(extent.path), begin + piece.element * stored.dtype.itemsize
        if self.files.check:
            self.files.check(extent.path, offset, part.nbytes)
        read(descriptor, extent.path, offset, memoryview(part))
        if self.once:
            os.posix_fadvise(descriptor, offset, part.nbytes, os.POSIX_FADV_DONTNEED)

    def _begin(self, stored: Stored, extent: Extent) -> int:
        """Where the elements of an archive lie; kept, for blocks of a tensor come to the same archives again."""
        key = extent.path, extent.offset
        if key not in self._begins:
            saved = safe_pickle.archive(self.files(extent.path), extent.path, extent.offset, extent.archive)
            if (
                not isinstance(saved, safe_pickle.Saved)
                or saved.dtype is not stored.dtype
                or saved.numel < extent.skip + extent.rows * extent.columns
                or not saved.contiguous
            ):
                raise RunError(Problem("checkpoint", extent.path, "holds other tensors than its metadata says"))
            if len(self._begins) > 10_000:
                self._begins.clear()
            self._begins[key] = saved.offset
        return self._begins[key]

    def _space(self, size: int) -> np.ndarray:
        if self._scratch.size < size:
            self._scratch = np.empty(size, np.uint8)
        return self._scratch[:size]


def read(descriptor: int, path: str, offset: int, view: memoryview) -> None:
    """Fill `view` with the bytes at `offset`. Raises RunError where the file ends before."""
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise RunError(Problem("file", path, f"cannot be read at byte {offset}: {error.strerror}")) from error
        if count == 0:
            said = f"is cut short: nothing at byte {offset}; copy it again, or merge another step"
            raise RunError(Problem("checkpoint", path, said))
        view, offset = view[count:], offset + count


def write(descriptor: int, offset: int, view: memoryview) -> None:
    """Write, and let the kernel begin to bring it to the disk: else that begins when all is written."""
    begin, size = offset, len(view)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)  # on dirty pages it starts their write-back
