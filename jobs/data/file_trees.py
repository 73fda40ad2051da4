"""Lists and opens files, on this machine or in a remote file system."""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from conf.data_endings import COMPRESSIONS


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    location: str
    """What messages call it: its path as the user gave it, or its address."""
    name: str
    """Its name, whose endings say how it is read."""
    path: str
    """Where to open it."""
    filesystem: Any = None
    """An fsspec file system for `path`; None for a file on this machine."""

    @property
    def compression(self) -> str:
        """.gz, .bz2, .xz or .zst; "" without one of these endings."""
        suffix = Path(self.name).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def format(self) -> str:
        """The ending that names the format, in lower case and without that of the compression: .jsonl of A.JSONL.GZ."""
        name = Path(self.name)
        return (name.with_suffix("") if self.compression else name).suffix.lower()

    def open(self) -> BinaryIO:
        if self.filesystem is None:
            return Path(self.path).open("rb")
        return cast(BinaryIO, self.filesystem.open(self.path, "rb"))

    def size(self) -> int:
        """In bytes."""
        return Path(self.path).stat().st_size if self.filesystem is None else int(self.filesystem.size(self.path))

    def state(self) -> list[Any]:
        """Size, times and inode, or what the remote file system has instead, to notice a change."""
        if self.filesystem is None:
            status = Path(self.path).stat()
            return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        self.filesystem.invalidate_cache()
        return [self.size(), str(self.filesystem.ukey(self.path))]


class LocalTree:
    """Lists files on this machine. Paths stay as the user wrote them, so that messages show the same."""

    def is_file(self, path: str) -> bool:
        return Path(path).exists() and not Path(path).is_dir()

    def is_dir(self, path: str) -> bool:
        return Path(path).is_dir()

    def find(self, folder: str) -> list[str]:
        return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())

    def glob(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern, recursive=True))

    def read(self, path: str) -> str:
        return Path(path).read_text(encoding="utf-8")

    def file(self, path: str) -> DataFile:
        return DataFile(path, Path(path).name, path)

    def shown(self, path: str) -> str:
        """The path as a user writes it."""
        return path


class RemoteTree:
    """Lists files of an fsspec file system."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def is_file(self, path: str) -> bool:
        return bool(self._filesystem.isfile(path))

    def is_dir(self, path: str) -> bool:
        return bool(self._filesystem.isdir(path))

    def find(self, folder: str) -> list[str]:
        return sorted(self._filesystem.find(folder))

    def glob(self, pattern: str) -> list[str]:
        return sorted(self._filesystem.glob(pattern))

    def read(self, path: str) -> str:
        return str(self._filesystem.cat_file(path).decode("utf-8"))

    def file(self, path: str) -> DataFile:
        return DataFile(self.shown(path), Path(path).name, path, self._filesystem)

    def shown(self, path: str) -> str:
        """The path as a user writes it."""
        return str(self._filesystem.unstrip_protocol(path))


Tree = LocalTree | RemoteTree
