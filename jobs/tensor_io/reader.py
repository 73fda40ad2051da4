"""Reads byte ranges of files, and blocks of stored tensors from them; writes byte ranges. Never maps a file into memory."""

import os
import threading
from collections.abc import Callable

import numpy as np

from conf.errors import Problem, RunError
from jobs.tensor_io import safe_pickle
from jobs.tensor_io.dequantize import Dequantizer
from jobs.tensor_io.dtypes import Bytes, as_bytes
from jobs.tensor_io.layout import Extent, Piece, StoredTensor, pieces

CHUNK = 4 * 2**20
"""Bytes per read: few enough that they are still in the CPU cache when they are cast, hashed and written, which takes a quarter
less time than with 16 MiB. Explicit reads, never mmap: on network file systems, reading page fault by page fault takes hours."""

MAX_KNOWN_ARCHIVES = 10_000
"""Archives of which a reader remembers where the elements begin, so that its memory does not grow with the checkpoint."""


Check = Callable[[str, int, int], None]
"""Called with (path, offset, number of bytes) before these bytes are read; raises RunError if they are damaged."""


class OpenFiles:
    """Open file descriptors by path, shared by all threads: opening a file is a round trip on a network file system."""

    def __init__(self, check: Check | None = None) -> None:
        self.check = check
        self._descriptors: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        """The descriptor of a file, opened on first use. Raises RunError if it cannot be opened."""
        with self._lock:
            if (path, flags) not in self._descriptors:
                try:
                    self._descriptors[path, flags] = os.open(path, flags)
                except OSError as error:
                    raise RunError(Problem("file", path, f"cannot be opened: {error.strerror}")) from error
            return self._descriptors[path, flags]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


class Reader:
    """Reads blocks of stored tensors for one thread."""

    def __init__(self, files: OpenFiles, *, drop_cache: bool = False) -> None:
        self.files = files
        self.drop_cache = drop_cache
        """Whether the kernel may drop each range from the page cache once it is read. The cache otherwise grows by the size of
        the model, and a page that is new costs more than the copy into it."""
        self._scratch = np.empty(0, np.uint8)
        self._element_offsets: dict[tuple[str, int], int] = {}
        self._dequantizer = Dequantizer(self._fetch)

    def fill(self, stored: StoredTensor, start: int, block: Bytes) -> None:
        """Read the flat elements from `start` on into `block`, in the dtype in which they are stored.

        Raises RunError if a file is missing, cut short, damaged or not what the metadata says.
        """
        size = stored.dtype.itemsize
        for piece in pieces(stored, start, start + block.size // size):
            target, nbytes = block[piece.start * size :], piece.rows * piece.columns * size
            if piece.rows == 1 or piece.columns == stored.width:
                self._read(stored, piece, target[:nbytes])
            else:  # the rows of the piece are contiguous in the file, but not in the block
                rows = self._buffer(nbytes)
                self._read(stored, piece, rows)
                shape, strides = (piece.rows, piece.columns * size), (stored.width * size, 1)
                np.lib.stride_tricks.as_strided(target, shape, strides)[:] = rows.reshape(shape)

    def _read(self, stored: StoredTensor, piece: Piece, target: Bytes) -> None:
        extent = piece.extent
        if extent.quantized is not None:
            count = target.size // stored.dtype.itemsize
            target[:] = as_bytes(self._dequantizer.read(extent, piece.element, piece.element + count).contiguous())
            return
        begin = self._offset_in_archive(stored, extent) if extent.archive else extent.offset
        self._fetch(extent.path, begin + piece.element * stored.dtype.itemsize, target)

    def _fetch(self, path: str, offset: int, target: Bytes) -> None:
        descriptor = self.files.open(path)
        if self.files.check:
            self.files.check(path, offset, target.nbytes)
        read(descriptor, path, offset, target.data)
        if self.drop_cache:
            os.posix_fadvise(descriptor, offset, target.nbytes, os.POSIX_FADV_DONTNEED)

    def _offset_in_archive(self, stored: StoredTensor, extent: Extent) -> int:
        """The byte at which the elements of a torch.save archive begin. Remembered: a tensor is read in many blocks."""
        key = extent.path, extent.offset
        if key not in self._element_offsets:
            descriptor = self.files.open(extent.path)
            saved = safe_pickle.load_archive(descriptor, extent.path, extent.offset, extent.archive)
            if (
                not isinstance(saved, safe_pickle.SavedTensor)
                or saved.dtype is not stored.dtype
                or saved.numel < extent.skip + extent.rows * extent.columns
                or not saved.contiguous
            ):
                raise RunError(Problem("checkpoint", extent.path, "does not hold the tensors that its metadata names"))
            if len(self._element_offsets) > MAX_KNOWN_ARCHIVES:
                self._element_offsets.clear()
            self._element_offsets[key] = saved.offset
        return self._element_offsets[key]

    def _buffer(self, size: int) -> Bytes:
        if self._scratch.size < size:
            self._scratch = np.empty(size, np.uint8)
        return self._scratch[:size]


class EndOfFile(OSError):
    """Raised if a file ends before the bytes that are wanted."""


def read_range(descriptor: int, path: str, offset: int, view: memoryview) -> None:
    """Fill `view` with the bytes at `offset`. Raises EndOfFile or another OSError."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EndOfFile(f"{path} ends at byte {offset}; it was longer when its header was read")
        view, offset = view[count:], offset + count


def read(descriptor: int, path: str, offset: int, view: memoryview) -> None:
    """Like `read_range`, for files of a checkpoint: raises RunError, which names the file."""
    try:
        read_range(descriptor, path, offset, view)
    except EndOfFile as error:
        message = f"is cut short: it ends before byte {offset + len(view)}; copy it again, or merge another step"
        raise RunError(Problem("checkpoint", path, message)) from error
    except OSError as error:
        raise RunError(Problem("file", path, f"cannot be read at byte {offset}: {error.strerror}")) from error


def write(descriptor: int, offset: int, view: memoryview) -> None:
    """Write all bytes, and let the kernel start to bring them to the disk now rather than at the end. Raises OSError."""
    begin, size = offset, len(view)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)  # on dirty pages this starts write-back
