"""Finds the system's error (disk full, quota, ...) after torch failed to write a file: its C++ code only reports a short write."""

import errno
import os
import tempfile
from pathlib import Path

SHORT_WRITE = ("unexpected pos", "PytorchStreamWriter", "iostream error", "file write failed")
"""Parts of torch's messages for a failed write (caffe2's inline_container.cc)."""


def is_write_error(error: BaseException) -> bool:
    """Whether a write failed; else the error is about the data that was to be written."""
    return isinstance(error, OSError) or any(text in str(error) for text in SHORT_WRITE)


def to_os_error(error: BaseException, folder: Path) -> OSError:
    """The system's error for a failed write in `folder`. The attempt's verdict and its advice depend on the error number."""
    causes = (error, error.__cause__, error.__context__)
    cause = next((item for item in causes if isinstance(item, OSError) and item.errno), None)
    number = cause.errno if cause and cause.errno else _probe(folder)
    return OSError(number, os.strerror(number), (cause and cause.filename) or str(folder))


def _probe(folder: Path) -> int:
    """Error number of a test write of 1 MiB to `folder`; EIO if that succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO
