"""The folder that is made: finished files outlive a restart, everything is read back, and one rename publishes it."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from conf.errors import Problem, RunError
from conf.files import partial, publish, read_json, write_json
from jobs.consolidation.plan import Plan
from jobs.tensor_io.reader import CHUNK, Files, read

RECORDS = ".finished"
"""Folder of one record a finished file; gone from a published result."""


@contextmanager
def writing(target: Path, alone: bool = True) -> Iterator[Path]:
    """The folder beside `target` in which it is made, for this process alone, or for it and those that it leads. What stops
    us short of being killed empties it, unless others still write. Raises RunError when another process is at it, or it
    cannot be written."""
    beside = partial(target)
    with told(target):
        beside.mkdir(parents=True, exist_ok=True)
        lock = os.open(beside, os.O_RDONLY)
    try:
        _lock(lock, beside)
        try:
            with told(target):
                yield beside
        except Exception:
            if alone:
                shutil.rmtree(beside, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            Problem("model", folder, "is being written by another process: wait for it, or end it")
        ) from None
    except OSError:
        return  # a file system without locks


@contextmanager
def told(target: Path) -> Iterator[None]:
    """Errors of the disk in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            said = "the disk or your quota is full: make room and merge again"
        elif error.errno == errno.EFBIG:
            said = (
                "files of this size are not allowed here (ulimit -f, file system): set a smaller consolidate.shard_gib"
            )
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            said = "cannot be written: choose a folder that is yours"
        else:
            said = "cannot be written"
        raise RunError(Problem("model", target, f"{said} ({error.strerror or error})")) from error


def finished(folder: Path, plan: Plan) -> dict[str, dict[str, str]]:
    """Checksums of the files that a start before this one finished for the same plan; all else in the folder is deleted."""
    records = folder / RECORDS
    found = {}
    if read_json(records / "plan.json") == plan.digest():
        for name, size in plan.sizes.items():
            sums = read_json(records / f"{name}.json")
            if sums is not None and (folder / name).exists() and (folder / name).stat().st_size == size:
                found[name] = sums
    for path in folder.iterdir():
        if path.is_dir() and path.name != RECORDS:
            shutil.rmtree(path)
        elif path.is_file() and path.name not in found:
            path.unlink()
    if not found:
        shutil.rmtree(records, ignore_errors=True)
        write_json(records / "plan.json", plan.digest())
    return found


def recorded(folder: Path, name: str) -> dict[str, str]:
    """Checksums of a file that is finished."""
    return dict(read_json(folder / RECORDS / f"{name}.json"))


def room(folder: Path, plan: Plan, done: Collection[str]) -> None:
    """Raises RunError when there is no room for the other files, before any is written."""
    needed = sum(size for name, size in plan.sizes.items() if name not in done)
    free = shutil.disk_usage(folder).free
    if free < needed:
        said = f"needs {needed / 2**30:.2f} GiB there and {free / 2**30:.2f} GiB are free: make room"
        raise RunError(Problem("model", folder, said))


def prepare(folder: Path, plan: Plan, names: Collection[str]) -> None:
    """Make these files at their full size, header written."""
    for name in names:
        with (folder / name).open("wb") as file:
            file.write(plan.heads[name])
            file.truncate(plan.sizes[name])


def record(folder: Path, name: str, sums: dict[str, str]) -> None:
    write_json(folder / RECORDS / f"{name}.json", sums)


def verify(folder: Path, plan: Plan, sums: dict[str, dict[str, str]], workers: int) -> int:
    """Read the files of `sums` back: header and the checksum of each tensor. Returns how many tensors there are.

    Raises RunError, and forgets that the file is finished, where one differs.
    """
    jobs = [
        (item.file, item.offset, item.output.nbytes, item.output.name)
        for task in plan.tasks
        for item in task.placed
        if item.file in sums
    ]
    files = Files()
    try:
        for name in sums:
            if os.pread(files.open(str(folder / name)), len(plan.heads[name]), 0) != plan.heads[name]:
                _wrong(folder, name, "header")
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(
                lambda job: _sum(files.open(str(folder / job[0])), str(folder / job[0]), job[1], job[2]), jobs
            )
            for (name, _, _, tensor), value in zip(jobs, found, strict=True):
                if value != sums[name][tensor]:
                    _wrong(folder, name, tensor)
    finally:
        files.close()
    return len(jobs)


def _sum(descriptor: int, path: str, offset: int, size: int) -> str:
    buffer, total = memoryview(bytearray(min(size, CHUNK))), xxhash.xxh3_64()
    for at in range(0, size, CHUNK):
        part = buffer[: min(CHUNK, size - at)]
        read(descriptor, path, offset + at, part)
        total.update(part)
    return str(total.hexdigest())


def _wrong(folder: Path, name: str, tensor: str) -> None:
    (folder / RECORDS / f"{name}.json").unlink(missing_ok=True)  # else the next start would keep the file
    said = f"{tensor} read back differs from what was written: merge again; look at this file system if it stays so"
    raise RunError(Problem("model", folder / name, said))


def finish(folder: Path, target: Path, plan: Plan, about: dict) -> None:
    """Publish what was verified, with muster.json as its last file."""
    shutil.rmtree(folder / RECORDS)
    if plan.index is not None:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    write_json(folder / "muster.json", about | {"verified": True})
    publish(target)
