"""The list of a checkpoint's files with sizes and checksums: made by the rank that wrote each file, checked before it is read."""

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from conf.errors import Problem, RunError
from conf.files import read_json, sync, write_json
from jobs.distributed import heartbeat

NAME = "manifest.json"
LAST = (NAME, "checkpoint.json")
"""Files that are written after the manifest has been made."""
PIECE = 64 * 2**20
"""Bytes a checksum covers: threads and ranks share a file by pieces, a message says where it differs, and who reads a part
checks that."""
READ = 4 * 2**20
THREADS = 4
WRITER = re.compile(r"^__(\d+)_\d+\.distcp$|zero_pp_rank_(\d+)_")
"""How torch and DeepSpeed name the file of a rank; every other file is written by rank 0."""

Files = dict[str, dict[str, Any]]


def written(folder: Path, rank: int) -> Files:
    """Flush the files that this rank wrote, and describe them: {name: {bytes, xxh3: [a checksum for each PIECE]}}.

    They are read back while they still lie in the page cache, so nothing is read from disk where memory suffices.
    """
    found = [path for path in _files(folder) if _writer(path.name)[0] == rank]
    with ThreadPoolExecutor(THREADS) as pool:
        flushed = [pool.submit(sync, path) for path in found]  # the disk's time, beside the processor's
        sizes = {path: path.stat().st_size for path in found}
        sums = {
            path: [pool.submit(_sum, path, first, PIECE) for first in range(0, sizes[path], PIECE)] for path in found
        }
        for done in flushed:
            done.result()
        return {
            path.relative_to(folder).as_posix(): {
                "bytes": sizes[path],
                "xxh3": [item.result() for item in sums[path]],
            }
            for path in found
        }


def write(folder: Path, files: Files) -> None:
    write_json(folder / NAME, {"piece": PIECE, "files": dict(sorted(files.items()))})


def size(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in _files(folder))


def torn(folder: Path) -> list[str]:
    """What is missing or cut short, a phrase a file, by name and size alone; checkpoints from before manifests have none."""
    try:
        about, listed = read_json(folder / "checkpoint.json"), read_json(folder / NAME)
        if about is None:
            return [f"{folder / 'checkpoint.json'} is missing"]
        step = int(about["step"])
        if folder.name.startswith("step-") and step != int(folder.name.removeprefix("step-")):
            return [f"{folder / 'checkpoint.json'} is of step {step}"]
        files = listed["files"] if listed else {}
        return [said for name, entry in files.items() if (said := _short(folder / name, int(entry["bytes"])))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder}: checkpoint.json or {NAME} is no longer what was written"]
    except OSError as error:
        return [f"{error.filename or folder} cannot be read: {error.strerror}"]


def differing(folder: Path, rank: int = 0, world_size: int = 1, threads: int = THREADS) -> list[str]:
    """What this rank's share of the files holds other than what was written, a phrase a piece; `torn` comes first.

    A rank reads what it wrote, and will load, so that it comes from disk once; with other ranks it is spread over them.
    """
    listed = read_json(folder / NAME)
    if listed is None:
        return []
    mine = [
        (folder / name, number * listed["piece"], int(entry["bytes"]), value)
        for name, entry in listed["files"].items()
        for number, value in enumerate(entry["xxh3"])
        if _reader(name, number, entry) % world_size == rank
    ]
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for said in pool.map(lambda piece: _differs(*piece, listed["piece"]), mine):
            heartbeat.alive()
            found += [said] if said else []
    return found


def check(folder: Path, threads: int = THREADS) -> None:
    """Raises RunError naming every file that is missing, cut short, or differs from what was written."""
    if said := torn(folder) or differing(folder, threads=threads):
        raise RunError(*(Problem("checkpoint", None, f"{item}: {REMEDY}") for item in said[:10]))


class Pieces:
    """Checks what is about to be read of a checkpoint's files, each piece when the first of its bytes is wanted.

    What nobody reads (of a merge, the moments beside the weights) costs nothing, and the rest comes from disk once: those who
    read a piece find it in the page cache. Threads may share one.
    """

    def __init__(self, folder: Path) -> None:
        listed = read_json(folder / NAME) or {"piece": PIECE, "files": {}}
        self._piece: int = listed["piece"]
        self._files = {str(folder / name): entry for name, entry in listed["files"].items()}
        self._good: set[tuple[str, int]] = set()
        self._busy: dict[tuple[str, int], threading.Lock] = {}

    def check(self, path: str, offset: int, count: int) -> None:
        """Raises RunError where a piece that has any of these `count` bytes is not what was written. Other files pass."""
        if entry := self._files.get(path):
            for number in range(offset // self._piece, -(-(offset + count) // self._piece)):
                if (path, number) not in self._good:
                    self._look(path, number, entry)

    def _look(self, path: str, number: int, entry: dict[str, Any]) -> None:
        key = path, number
        with self._busy.setdefault(key, threading.Lock()):
            if key in self._good:
                return
            first, sums = number * self._piece, entry["xxh3"]
            if said := _differs(Path(path), first, int(entry["bytes"]), sums[number], self._piece):
                raise RunError(Problem("checkpoint", None, f"{said}: {REMEDY}"))
            self._good.add(key)


REMEDY = "copy the file again if you have it elsewhere, or delete the checkpoint to go back to the one before"


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in LAST:
            yield path


def _writer(name: str) -> tuple[int, bool]:
    """Rank that wrote a file, and whether its name says so."""
    found = WRITER.search(name)
    return (int(found[1] or found[2]), True) if found else (0, False)


def _reader(name: str, number: int, entry: dict[str, Any]) -> int:
    """What all ranks load (ZeRO's whole weights) is shared by pieces."""
    rank, named = _writer(Path(name).name)
    return rank if named else number


def _short(path: Path, length: int) -> str:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    return "" if found == length else f"{path} has {found} bytes, {length} were written"


def _differs(path: Path, first: int, length: int, value: str, piece: int) -> str:
    last = min(first + piece, length)
    try:
        same = _sum(path, first, piece) == value
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return "" if same else f"{path} is not what was written (bytes {first} to {last})"


def _sum(path: Path, first: int, piece: int) -> str:
    """XXH3 of the bytes of a file from `first` on, at most a piece of them."""
    found, buffer, last = xxhash.xxh3_64(), memoryview(bytearray(READ)), first + piece
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while first < last and (count := os.preadv(descriptor, [buffer[: last - first]], first)):
            found.update(buffer[:count])
            first += count
    finally:
        os.close(descriptor)
    return str(found.hexdigest())
