"""Writes and checks a checkpoint's manifest.json: size and checksums of every file, computed by the rank that wrote the file."""

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
"""Files that are written after the checksums are computed, and so are not in the manifest."""
PIECE = 64 * 2**20
"""Bytes that one checksum covers. So threads and ranks can share a file, a message can say where the file is damaged, and a
reader of a part of the file checks only that part."""
READ_BYTES = 4 * 2**20
THREADS = 4
WRITER = re.compile(r"^__(\d+)_\d+\.distcp$|zero_pp_rank_(\d+)_")
"""File names of torch DCP and DeepSpeed that contain the rank. Every other file is written by rank 0."""

Files = dict[str, dict[str, Any]]
"""File name, relative to the checkpoint -> {"bytes": size, "xxh3": [checksum of each PIECE]}."""


def flush_and_describe(folder: Path, rank: int) -> Files:
    """Flush the files that this rank wrote to disk, and return their sizes and checksums.

    The files are read back while they are still in the page cache, so with enough memory nothing is read from disk.
    """
    paths = [path for path in _files(folder) if _writer(path.name)[0] == rank]
    with ThreadPoolExecutor(THREADS) as pool:
        flushed = [pool.submit(sync, path) for path in paths]  # the disk works while the CPU computes checksums
        sizes = {path: path.stat().st_size for path in paths}
        sums = {
            path: [pool.submit(_sum, path, first, PIECE) for first in range(0, sizes[path], PIECE)] for path in paths
        }
        for future in flushed:
            future.result()
        return {
            path.relative_to(folder).as_posix(): {
                "bytes": sizes[path],
                "xxh3": [future.result() for future in sums[path]],
            }
            for path in paths
        }


def write(folder: Path, files: Files) -> None:
    """Write manifest.json for the files of all ranks. Only rank 0 calls this."""
    write_json(folder / NAME, {"piece": PIECE, "files": dict(sorted(files.items()))})


def digest(folder: Path) -> str | None:
    """A hash of the manifest, and so of all files; None for an old checkpoint that has none."""
    path = folder / NAME
    return xxhash.xxh3_64_hexdigest(path.read_bytes()) if path.exists() else None


def size(folder: Path) -> int:
    """Total bytes of a checkpoint's files, without manifest.json and checkpoint.json."""
    return sum(path.stat().st_size for path in _files(folder))


def size_problems(folder: Path) -> list[str]:
    """One phrase for each file that is missing or has another size than the manifest says. Reads no file's content.

    Old checkpoints have no manifest; for them only checkpoint.json is checked.
    """
    try:
        info, manifest = read_json(folder / "checkpoint.json"), read_json(folder / NAME)
        if info is None:
            return [f"{folder / 'checkpoint.json'} is missing"]
        step = int(info["step"])
        if folder.name.startswith("step-") and step != int(folder.name.removeprefix("step-")):
            return [f"{folder / 'checkpoint.json'} is of step {step}"]
        files = manifest["files"] if manifest else {}
        sizes = (_size_problem(folder / name, int(entry["bytes"])) for name, entry in files.items())
        return [problem for problem in sizes if problem]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{folder}: checkpoint.json or {NAME} is damaged"]
    except OSError as error:
        return [f"{error.filename or folder} cannot be read: {error.strerror}"]


def checksum_problems(folder: Path, rank: int = 0, world_size: int = 1, threads: int = THREADS) -> list[str]:
    """One phrase for each piece whose checksum is wrong, of this rank's share of the files. Call `size_problems` first.

    A rank reads the files that it wrote: it is going to load them, so they come from disk only once. If the number of ranks has
    changed, the files are divided over the ranks.
    """
    manifest = read_json(folder / NAME)
    if manifest is None:
        return []
    pieces = [
        (folder / name, number * manifest["piece"], int(entry["bytes"]), value)
        for name, entry in manifest["files"].items()
        for number, value in enumerate(entry["xxh3"])
        if _reader(name, number, entry) % world_size == rank
    ]

    def check_piece(piece: tuple[Path, int, int, str]) -> str:
        path, first, length, checksum = piece
        return _checksum_problem(path, first, length, checksum, manifest["piece"])

    problems = []
    with ThreadPoolExecutor(threads) as pool:
        for problem in pool.map(check_piece, pieces):
            heartbeat.refresh()
            problems += [problem] if problem else []
    return problems


def check(folder: Path, threads: int = THREADS) -> None:
    """Raise RunError with the first ten problems if files are missing, have a wrong size or a wrong checksum."""
    if problems := size_problems(folder) or checksum_problems(folder, threads=threads):
        raise RunError(*(Problem("checkpoint", None, f"{problem}: {REMEDY}") for problem in problems[:10]))


class PieceChecker:
    """Compares checksums just before a part of a checkpoint is read: each piece once, when its first byte is needed.

    Pieces that nobody reads cost nothing: consolidation, for example, does not read the optimizer's moments. Every other piece
    comes from disk once, because the reader then finds it in the page cache. Threads may share one object.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_json(folder / NAME) or {"piece": PIECE, "files": {}}
        self._piece: int = manifest["piece"]
        self._files = {str(folder / name): entry for name, entry in manifest["files"].items()}
        self._good: set[tuple[str, int]] = set()
        self._locks: dict[tuple[str, int], threading.Lock] = {}

    def check(self, path: str, offset: int, count: int) -> None:
        """Raise RunError if a piece with any of the bytes [offset, offset + count) has a wrong checksum. Unlisted files pass."""
        if entry := self._files.get(path):
            for number in range(offset // self._piece, -(-(offset + count) // self._piece)):
                if (path, number) not in self._good:
                    self._check_piece(path, number, entry)

    def _check_piece(self, path: str, number: int, entry: dict[str, Any]) -> None:
        key = path, number
        with self._locks.setdefault(key, threading.Lock()):
            if key in self._good:
                return
            first, sums = number * self._piece, entry["xxh3"]
            if problem := _checksum_problem(Path(path), first, int(entry["bytes"]), sums[number], self._piece):
                raise RunError(Problem("checkpoint", None, f"{problem}: {REMEDY}"))
            self._good.add(key)


REMEDY = "copy the file again if you have it elsewhere, or delete this checkpoint to continue from the one before it"


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in LAST:
            yield path


def _writer(name: str) -> tuple[int, bool]:
    """(rank that wrote a file, whether the file's name contains the rank)."""
    match = WRITER.search(name)
    return (int(match[1] or match[2]), True) if match else (0, False)


def _reader(name: str, number: int, entry: dict[str, Any]) -> int:
    """Rank that checks a piece. The pieces of a file that all ranks load (ZeRO's whole weights) are divided over the ranks."""
    rank, named = _writer(Path(name).name)
    return rank if named else number


def _size_problem(path: Path, length: int) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    return "" if size == length else f"{path} has {size} bytes, {length} were written"


def _checksum_problem(path: Path, first: int, length: int, value: str, piece: int) -> str:
    last = min(first + piece, length)
    try:
        same = _sum(path, first, piece) == value
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return "" if same else f"{path} has a wrong checksum in bytes {first} to {last}"


def _sum(path: Path, first: int, piece: int) -> str:
    """XXH3 (64 bits, hex) of at most `piece` bytes of a file, from byte `first` on."""
    checksum, buffer, last = xxhash.xxh3_64(), memoryview(bytearray(READ_BYTES)), first + piece
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while first < last and (count := os.preadv(descriptor, [buffer[: last - first]], first)):
            checksum.update(buffer[:count])
            first += count
    finally:
        os.close(descriptor)
    return str(checksum.hexdigest())
