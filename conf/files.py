"""Writes files and folders that are complete or absent: written beside, synced, then renamed into place."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file or folder to disk; a rename is only safe once what it publishes has been written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, then the folders."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def write_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Publish `text` at `path`. A reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON at `path`."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The JSON at `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def partial(folder: Path) -> Path:
    """Where `folder` is written before it is published; names that start with a dot are never taken for whole."""
    return folder.with_name(f".{folder.name}.partial")


def publish(folder: Path) -> None:
    """Rename the finished `partial(folder)` to `folder`. Raises FileExistsError rather than replace a whole one."""
    publish_as(partial(folder), folder)


def publish_as(beside: Path, folder: Path) -> None:
    """Rename the finished folder `beside` to `folder`. Raises FileExistsError rather than replace a whole one."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    sync_tree(beside)
    os.rename(beside, folder)
    sync(folder.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends well, and vanishes when it does not."""
    beside = partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        publish(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
