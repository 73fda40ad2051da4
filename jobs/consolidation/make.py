"""Carries a plan out, start to end: room, finished files, stream, read back, describe, publish."""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.errors import Problem, RunError
from jobs.consolidation import result, stream
from jobs.consolidation.plan import Plan


def make(
    plan: Plan, target: Path, workers: int, source: Path, describe: Callable[[Path], None], about: dict[str, Any]
) -> None:
    """Write, verify and publish `target`; one that is there already is moved aside. Raises RunError."""
    began = time.perf_counter()
    with result.writing(target) as beside:
        sums = result.finished(beside, plan)
        if sums:
            print(f"{len(sums)} of {len(plan.sizes)} files were finished by a start before this one", flush=True)
        result.prepare(beside, plan, sums)
        _stream(plan, beside, workers, source, sums)
        seconds = time.perf_counter() - began
        print(f"reading {len(plan.sizes)} files back", flush=True)
        checked = result.verify(beside, plan, sums, workers)
        describe(beside)
        retire(target)
        result.finish(
            beside, target, plan, about | {"crc32": {name: dict(sorted(sums[name].items())) for name in plan.sizes}}
        )
    read, written = plan.read_bytes / 1e9, plan.written_bytes / 1e9
    print(
        f"read {read:.2f} GB and wrote {written:.2f} GB in {seconds:.1f} s with {workers} workers, "
        f"{(read + written) / seconds:.2f} GB/s; {checked} tensors read back in {time.perf_counter() - began - seconds:.1f} s",
        flush=True,
    )
    if prints := sum(task.sha256 is not None for task in plan.tasks):
        print(f"{prints} weights equal those in training, bit for bit", flush=True)


def _stream(plan: Plan, folder: Path, workers: int, source: Path, sums: dict[str, dict[str, int]]) -> None:
    lock, done = threading.Lock(), set(sums)
    left = sum(t.stored.nbytes for t in plan.tasks if not t.placed or {item.file for item in t.placed} - done)
    with tqdm(
        total=left, desc="weights", unit="B", unit_scale=True, mininterval=1 if sys.stderr.isatty() else 10
    ) as bar:

        def moved(count: int) -> None:
            with lock:
                bar.update(count)

        def finished(name: str, found: dict[str, int]) -> None:
            result.record(folder, name, found)
            sums[name] = found

        try:
            stream.carry_out(plan, folder, workers, done, moved, finished)
        except stream.Differs as error:
            said = (
                f"weight {error} differs from that in training: the files have changed or been damaged; "
                "delete this checkpoint to go back to the one before"
            )
            raise RunError(Problem("checkpoint", source, said)) from error


def retire(target: Path) -> None:
    """Move a model of an older checkpoint aside, so that the new one can be published by rename."""
    if target.exists():
        number = 1
        while (aside := target.with_name(f"{target.name}.{number}")).exists():
            number += 1
        target.rename(aside)
        print(f"the model that was there is now {aside}", flush=True)


def workers(asked: int | None = None) -> int:
    """Two at least: one reads while the other writes. More than 32 do not help a disk."""
    return min(32, max(2, asked or len(os.sched_getaffinity(0))))
