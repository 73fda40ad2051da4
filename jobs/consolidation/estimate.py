"""What a plan will take, before it is carried out: bytes, files, memory, and time at the bandwidth that a short probe finds."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conf.files import partial
from jobs.consolidation.plan import Plan
from jobs.tensor_io.reader import CHUNK, write

PROBE = 256 * 2**20
"""Bytes that a probe writes and reads, at most; a four-hundredth of what is to be moved where that is less."""
SHARE = 400
"""So much more is moved than a probe moves: a merge should not wait for its estimate."""
LEAST = 64 * 2**20
"""Bytes below which a probe says nothing, and what it would be for takes moments."""
BUFFERS = 4
"""Chunks that a worker holds: read, put together of columns, added to, cast."""
RUNTIME = 400 * 2**20
"""Bytes of Python with torch and transformers; measured by benchmarks/consolidate.py as anonymous memory."""


@dataclass(frozen=True)
class Speed:
    """Of a folder, in bytes/s, to the disk and from it."""

    write: float
    read: float
    probed: int
    """Bytes moved to find out."""


def lines(plan: Plan, workers: int, folder: Path, processes: int = 1) -> list[str]:
    """The plan in words; `folder` is where it will be written, or where that will be made. `processes` share the work."""
    read, written = plan.read_bytes, plan.written_bytes
    head = f"{_gb(read)} to read, {_gb(written)} to write, {len(plan.sizes)} files, {len(plan.tasks)} tensors"
    held = memory(plan, workers)
    found = [
        f"plan      {head}",
        f"memory    about {held / 2**30:.1f} GiB: {workers} workers a process, any size of model",
    ]
    moved = read + 2 * written
    if (size := min(PROBE, moved // SHARE)) < LEAST:
        return found
    try:
        speed = probe(folder, size, workers)
    except OSError as error:
        return [*found, f"time      not estimated: {folder} cannot be tried ({error.strerror})"]
    seconds = (read + written) / speed.read + written / speed.write
    shared = f", less with {processes} processes where the disk allows" if processes > 1 else ""
    how = f"{_gb(speed.read)}/s read and {_gb(speed.write)}/s written, by {speed.probed >> 20} MiB tried there just now"
    return [*found, f"time      about {_duration(seconds)} with reading it all back{shared}; {how}"]


def memory(plan: Plan, workers: int) -> int:
    """Bytes of one process, without pages of files that the kernel can take back."""
    updates = [task.update for task in plan.tasks if task.update is not None]
    adapters = sum(part.nbytes for update in updates for part in (update.a, update.b))
    widest = max((update.a.shape[1] * 4 for update in updates), default=0)
    return RUNTIME + workers * BUFFERS * max(CHUNK, widest) + adapters


def probe(folder: Path, size: int, workers: int) -> Speed:
    """Write, flush and read back a file of about `size` bytes beside the result, on as many threads; it is gone afterwards.

    Its pages are given back to the kernel in between, so that the disk is read. Raises OSError.
    """
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    path = place / f"{partial(Path('probe')).name}.{os.getpid()}"
    count = max(1, size // CHUNK)
    noise = os.urandom(CHUNK)  # file systems may compress
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with ThreadPoolExecutor(workers) as pool:
            began = time.perf_counter()
            list(pool.map(lambda at: write(descriptor, at * CHUNK, memoryview(noise)), range(count)))
            os.fsync(descriptor)
            written = time.perf_counter()
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            list(pool.map(lambda at: len(os.pread(descriptor, CHUNK, at * CHUNK)), range(count)))
            ended = time.perf_counter()
    finally:
        os.close(descriptor)
        path.unlink()
    moved = count * CHUNK
    return Speed(moved / (written - began), moved / (ended - written), moved)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
