"""Finds out what the system said when torch failed to write a file: its C++ keeps only that fewer bytes arrived."""

import errno
import os
import tempfile
from pathlib import Path

CUT_SHORT = ("unexpected pos", "PytorchStreamWriter", "iostream error", "file write failed")
"""torch's words for a write that failed (caffe2's inline_container.cc)."""


def is_one(error: BaseException) -> bool:
    """Whether this is a failed write at all, rather than a fault of what was to be written."""
    return isinstance(error, OSError) or any(words in str(error) for words in CUT_SHORT)


def from_system(error: BaseException, folder: Path) -> OSError:
    """The system's error for a failed write in `folder`; a verdict and its remedy go by the number."""
    causes = (error, error.__cause__, error.__context__)
    found = next((item for item in causes if isinstance(item, OSError) and item.errno), None)
    number = found.errno if found and found.errno else _probe(folder)
    return OSError(number, os.strerror(number), (found and found.filename) or str(folder))


def _probe(folder: Path) -> int:
    """Why nothing more can be written to a folder: the error of a small write, or EIO where that succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO
