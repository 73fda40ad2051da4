"""Estimates what a plan will take: bytes, files, memory, and time at the bandwidth that a short probe of the disk measures."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conf.files import partial
from jobs.consolidation.plan import Plan
from jobs.tensor_io.reader import CHUNK, write

MAX_PROBE_BYTES = 256 * 2**20
"""The probe writes and reads at most this, or a 400th of the bytes of the merge if that is less."""
PROBE_SHARE = 400
"""The merge moves at least this many times the bytes of the probe, so that the probe takes little of the time."""
MIN_PROBE_BYTES = 64 * 2**20
"""A smaller probe measures nothing useful, and a merge that small takes moments."""
BUFFERS = 4
"""Chunks that each worker holds: as read, rearranged from columns, with the adapter added, cast."""
RUNTIME_BYTES = 400 * 2**20
"""Python with torch and transformers; anonymous memory measured by benchmarks/consolidate.py."""


@dataclass(frozen=True)
class Speed:
    """Bandwidth of a folder, in bytes/s."""

    write: float
    read: float
    probed: int
    """Bytes that were moved to measure it."""


def describe(plan: Plan, workers: int, folder: Path, processes: int = 1) -> list[str]:
    """Log lines on the plan. Probes the disk of `folder`, which need not exist yet. `processes` share the work."""
    read, written = plan.read_bytes, plan.written_bytes
    sizes = f"{_gb(read)} to read, {_gb(written)} to write, {len(plan.sizes)} files, {len(plan.tasks)} tensors"
    memory = memory_bytes(plan, workers)
    lines = [
        f"plan      {sizes}",
        f"memory    about {memory / 2**30:.1f} GiB per process with {workers} workers, whatever the size of the model",
    ]
    moved = read + 2 * written
    if (size := min(MAX_PROBE_BYTES, moved // PROBE_SHARE)) < MIN_PROBE_BYTES:
        return lines
    try:
        speed = probe(folder, size, workers)
    except OSError as error:
        return [*lines, f"time      not estimated: {folder} cannot be probed ({error.strerror})"]
    seconds = (read + written) / speed.read + written / speed.write
    shared = f", less with {processes} processes if the disk allows it" if processes > 1 else ""
    measured = (
        f"{_gb(speed.read)}/s read and {_gb(speed.write)}/s written, measured there with {speed.probed >> 20} MiB"
    )
    return [*lines, f"time      about {_duration(seconds)}, reading everything back included{shared}; {measured}"]


def memory_bytes(plan: Plan, workers: int) -> int:
    """Memory of one process, without file pages that the kernel can take back."""
    updates = [task.update for task in plan.tasks if task.update is not None]
    adapters = sum(part.nbytes for update in updates for part in (update.a, update.b))
    widest_row = max((update.a.shape[1] * 4 for update in updates), default=0)
    return RUNTIME_BYTES + workers * BUFFERS * max(CHUNK, widest_row) + adapters


def probe(folder: Path, size: int, workers: int) -> Speed:
    """Write, flush and read back a file of about `size` bytes with `workers` threads, then delete it.

    Its pages are dropped from the cache before it is read, so that it is read from the disk. Raises OSError.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    path = existing / f"{partial(Path('probe')).name}.{os.getpid()}"
    count = max(1, size // CHUNK)
    noise = os.urandom(CHUNK)  # random, because some file systems compress
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with ThreadPoolExecutor(workers) as pool:
            began = time.perf_counter()
            list(pool.map(lambda number: write(descriptor, number * CHUNK, memoryview(noise)), range(count)))
            os.fsync(descriptor)
            written = time.perf_counter()
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            list(pool.map(lambda number: len(os.pread(descriptor, CHUNK, number * CHUNK)), range(count)))
            ended = time.perf_counter()
    finally:
        os.close(descriptor)
        path.unlink()
    moved = count * CHUNK
    return Speed(moved / (written - began), moved / (ended - written), moved)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
