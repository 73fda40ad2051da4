"""Writes files and folders that are either complete or absent: write to a temporary name, fsync, then rename."""

from __future__ import annotations  # the node's own Python 3.9 runs this too, outside the container

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file or folder to disk. Without that, a crash after a rename may leave an empty file under the new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file in `folder`, then the folders themselves."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


EVERYONE, PROGRAM = 0o666, 0o777
"""Modes of new files, before the umask: a group can share a run with `umask 007` or `umask 027`."""


def write_text(path: Path, text: str, mode: int = EVERYONE) -> None:
    """Write `text` to `path`. A reader sees the old content or the new, never part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    # Not tempfile: its files are closed to the group, and chmod cannot know the umask, nor a folder's default ACL.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, like `write_text`."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def partial(folder: Path) -> Path:
    """The folder to write before it is renamed to `folder`. Names that start with a dot never count as complete."""
    return folder.with_name(f".{folder.name}.partial")


def publish(folder: Path) -> None:
    """Rename the finished `partial(folder)` to `folder`. Raises FileExistsError if `folder` exists."""
    publish_as(partial(folder), folder)


def publish_as(finished: Path, folder: Path) -> None:
    """Rename the folder `finished` to `folder`. Raises FileExistsError if `folder` exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} already exists")
    sync_tree(finished)
    os.rename(finished, folder)
    sync(folder.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. It becomes `folder` when the block ends, and is removed if the block raises."""
    unfinished = partial(folder)
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        publish(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
