"""The folder of the result: files that are finished survive a restart, every byte is read back, and one rename publishes it."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from conf.errors import Problem, RunError
from conf.files import partial, publish, read_json, write_json
from jobs.consolidation.plan import PlacedOutput, Plan
from jobs.tensor_io.reader import CHUNK, OpenFiles, read

RECORDS = ".finished"
"""Folder with one record per finished file; removed before the result is published."""
Checksums = dict[str, dict[str, str]]
"""File -> tensor -> XXH3 of its bytes."""


@contextmanager
def locked_partial_folder(target: Path, alone: bool = True) -> Iterator[Path]:
    """The folder beside `target` in which the result is made, locked for this process (and the ranks that it leads).

    An error empties the folder, unless other ranks still write to it; a kill leaves it for the next start.
    Raises RunError if another process has locked it, or if it cannot be written.
    """
    folder = partial(target)
    with explain_disk_errors(target):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        try:
            with explain_disk_errors(target):
                yield folder
        except Exception:
            if alone:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        message = "is being written by another process: wait for that process, or end it"
        raise RunError(Problem("model", folder, message)) from None
    except OSError:
        return  # this file system has no locks


@contextmanager
def explain_disk_errors(target: Path) -> Iterator[None]:
    """Turn an OSError into a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "the disk or your quota is full: free space and merge again"
        elif error.errno == errno.EFBIG:
            message = "files of this size are not allowed (ulimit -f, file system): set a smaller consolidate.shard_gib"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            message = "cannot be written: choose a folder that you can write to"
        else:
            message = "cannot be written"
        raise RunError(Problem("model", target, f"{message} ({error.strerror or error})")) from error


def find_finished(folder: Path, plan: Plan) -> Checksums:
    """Checksums of the files that an earlier start finished for the same plan. Deletes everything else in the folder."""
    records = folder / RECORDS
    checksums = {}
    if read_json(records / "plan.json") == plan.digest():
        for name, size in plan.sizes.items():
            recorded = read_json(records / f"{name}.json")
            if recorded is not None and (folder / name).exists() and (folder / name).stat().st_size == size:
                checksums[name] = recorded
    for path in folder.iterdir():
        if path.is_dir() and path.name != RECORDS:
            shutil.rmtree(path)
        elif path.is_file() and path.name not in checksums:
            path.unlink()
    if not checksums:
        shutil.rmtree(records, ignore_errors=True)
        write_json(records / "plan.json", plan.digest())
    return checksums


def read_record(folder: Path, name: str) -> dict[str, str]:
    """Checksums of the tensors of a finished file."""
    return dict(read_json(folder / RECORDS / f"{name}.json"))


def write_record(folder: Path, name: str, checksums: dict[str, str]) -> None:
    """Remember that a file is finished: written and flushed."""
    write_json(folder / RECORDS / f"{name}.json", checksums)


def check_free_space(folder: Path, plan: Plan, finished: Collection[str]) -> None:
    """Raise RunError, before anything is written, if the files that are not finished do not fit on the disk."""
    needed = sum(size for name, size in plan.sizes.items() if name not in finished)
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free: free space"
        raise RunError(Problem("model", folder, message))


def create_files(folder: Path, plan: Plan, names: Collection[str]) -> None:
    """Make these files in their full size, with their headers."""
    for name in names:
        with (folder / name).open("wb") as file:
            file.write(plan.headers[name])
            file.truncate(plan.sizes[name])


def read_back(folder: Path, plan: Plan, checksums: Checksums, workers: int) -> int:
    """Compare header and tensors of the files in `checksums` with what was written. Returns how many tensors there are.

    Raises RunError if one differs; the next start then writes its file again.
    """
    tensors = [item for task in plan.tasks for item in task.placed if item.file in checksums]
    files = OpenFiles()

    def checksum(item: PlacedOutput) -> str:
        path = str(folder / item.file)
        return _checksum(files.open(path), path, item.offset, item.output.nbytes)

    try:
        for name in checksums:
            header = plan.headers[name]
            if os.pread(files.open(str(folder / name)), len(header), 0) != header:
                raise _differs(folder, name, "header")
        with ThreadPoolExecutor(workers) as pool:
            for item, value in zip(tensors, pool.map(checksum, tensors), strict=True):
                if value != checksums[item.file][item.output.name]:
                    raise _differs(folder, item.file, item.output.name)
    finally:
        files.close()
    return len(tensors)


def _checksum(descriptor: int, path: str, offset: int, size: int) -> str:
    buffer, total = memoryview(bytearray(min(size, CHUNK))), xxhash.xxh3_64()
    for start in range(0, size, CHUNK):
        part = buffer[: min(CHUNK, size - start)]
        read(descriptor, path, offset + start, part)
        total.update(part)
    return str(total.hexdigest())


def _differs(folder: Path, name: str, tensor: str) -> RunError:
    (folder / RECORDS / f"{name}.json").unlink(missing_ok=True)  # otherwise the next start would keep the file
    message = (
        f"{tensor} read back differs from what was written: merge again; if it happens again, check the file system"
    )
    return RunError(Problem("model", folder / name, message))


def publish_result(folder: Path, target: Path, plan: Plan, muster_json: dict[str, Any], verified: bool) -> None:
    """Write the index and, as the last file, muster.json; then rename `folder` to `target`. Call it after `read_back`."""
    shutil.rmtree(folder / RECORDS)
    if plan.index is not None:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    write_json(folder / "muster.json", muster_json | {"verified": verified})
    publish(target)
