"""Turns whatever a file of others makes fail into one message, and says whether a path stays in its folder. Imports no torch."""

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import DataError, Problem, RunError, UserError
from conf.files import read_json

LONGEST_NAME = 255
"""Bytes of the longest name that Linux's file systems take."""
EXPLAINED = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError)
"""Errors whose text is short and says what is wrong. That of others may hold a whole object of the file."""


@contextmanager
def refused_if_damaged(path: Path | str, message: str = "cannot be read, it is damaged") -> Iterator[None]:
    """Raise RunError, which begins with `message`, for any error in the block, which reads what somebody else may have written.

    Such a file can hold any object in any place. So it can raise any error, also for memory or recursion.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, EXPLAINED) else type(error).__name__
        reason = str(error.strerror) if isinstance(error, OSError) and error.strerror else reason
        remedy = "copy it again, or go back to the checkpoint before"
        raise RunError(Problem("checkpoint", path, f"{message} ({reason}): {remedy}")) from error


def is_plain_name(name: object) -> bool:
    """Whether this is the name of a file, not a path: an index must not point to files outside its folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or len(name.encode("utf-8", "replace")) > LONGEST_NAME:
        return False
    return Path(name).name == name and name.isprintable()


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with all links followed, lies in `folder`.

    The Hub's cache counts as one folder: the files of a snapshot are links to the blobs of the same repository.
    """
    real, home = path.resolve(), folder.resolve()
    snapshots = next((parent for parent in (home, *home.parents) if parent.name == "snapshots"), None)
    homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    return any(real.is_relative_to(item) for item in homes)


def check_inside(path: Path, folder: Path) -> None:
    """Raise RunError if a path leads out of `folder`."""
    if not stays_inside(path, folder):
        message = f"leads out of {folder}, to {path.resolve()}: copy the file or folder there, without a link"
        raise RunError(Problem("checkpoint", path, message))


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file. Raises DataError if it holds something else."""
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            Problem("model", path, f"is not JSON ({type(error).__name__}): copy or download it again")
        ) from error
    if content is not None and not isinstance(content, dict):
        raise DataError(Problem("model", path, "is not a JSON object: copy or download it again"))
    return content
