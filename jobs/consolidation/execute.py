"""Carries a plan out, start to end: room, finished files, stream, read back, describe, publish."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.errors import Problem, RunError
from conf.files import partial
from jobs.consolidation import estimate, output_folder
from jobs.consolidation import workers as stream
from jobs.consolidation.plan import Plan
from jobs.consolidation.rank_meeting import Meeting, Sums
from jobs.tensor_io.reader import Check

log = logging.getLogger(__name__)


def make(
    plan: Plan,
    target: Path,
    workers: int,
    source: Path,
    describe: Callable[[Path], None],
    about: dict[str, Any],
    check: Check | None = None,
) -> None:
    """Write, verify and publish `target`; one that is there already is moved aside. Raises RunError, as `check` does, which is
    asked before bytes of a source are read.

    Other ranks of the job call this too, with the same plan, and take their share of the files.
    """
    with Meeting(target) as meeting:
        making = _Making(plan, workers, source, check, meeting)
        if meeting.rank:  # it does its share, and leaves the rest to rank 0
            files, done = meeting.join(plan)
            meeting.done(making.work(partial(target), files, done))
            return
        with output_folder.writing(target, meeting.alone) as beside:
            sums = output_folder.finished(beside, plan)
            if sums:
                log.info(f"{len(sums)} of {len(plan.sizes)} files were finished by a start before this one")
            output_folder.room(beside, plan, sums)
            for line in estimate.lines(plan, workers, beside, meeting.size):
                log.info(line)
            files = meeting.share(plan, sums)
            sums = making.work(beside, files, set(sums)) | meeting.gather()
            describe(beside)
            retire(target)
            sums = {name: dict(sorted(sums[name].items())) for name in plan.sizes}
            output_folder.finish(beside, target, plan, about | {"xxh3": sums})
    if prints := sum(task.sha256 is not None for task in plan.tasks):
        log.info(f"{prints} weights equal those in training, bit for bit")


@dataclass(frozen=True)
class _Making:
    """What a rank has to do, and with what."""

    plan: Plan
    workers: int
    source: Path
    check: Check | None
    meeting: Meeting

    def work(self, folder: Path, files: dict[str, int], done: set[str]) -> Sums:
        """Write and read back this rank's share of the files, but for those that are done, which it reads back."""
        plan, rank, size = self.plan, self.meeting.rank, self.meeting.size
        began, mine = time.perf_counter(), {name for name, owner in files.items() if owner == rank}
        sums = {name: output_folder.recorded(folder, name) for name in mine & done}
        output_folder.prepare(folder, plan, mine - done)
        looked = [task for number, task in enumerate(plan.tasks) if task.placed or number % size == rank]
        moved = self._stream(replace(plan, tasks=tuple(looked)), folder, sums, (files.keys() - mine) | done)
        seconds = time.perf_counter() - began
        log.info(f"reading {len(mine)} files back")
        checked = output_folder.verify(folder, plan, sums, self.workers)
        written = sum(plan.sizes[name] for name in mine - done)
        log.info(
            f"read {moved / 1e9:.2f} GB and wrote {written / 1e9:.2f} GB in {seconds:.1f} s with {self.workers} workers, "
            f"{(moved + written) / 1e9 / seconds:.2f} GB/s; "
            f"{checked} tensors read back in {time.perf_counter() - began - seconds:.1f} s"
        )
        return sums

    def _stream(self, plan: Plan, folder: Path, sums: Sums, done: set[str]) -> int:
        """Carry a plan out but for the files that are `done`; adds to `sums`, and returns how many bytes there were to read."""
        lock = threading.Lock()
        left = sum(t.stored.nbytes for t in plan.tasks if not t.placed or {item.file for item in t.placed} - done)
        with tqdm(
            total=left, desc="weights", unit="B", unit_scale=True, mininterval=1 if sys.stderr.isatty() else 10
        ) as bar:

            def moved(count: int) -> None:
                with lock:
                    bar.update(count)

            def finished(name: str, found: dict[str, str]) -> None:
                output_folder.record(folder, name, found)
                sums[name] = found

            try:
                stream.carry_out(plan, folder, self.workers, done, moved, finished, self.check)
            except stream.Differs as error:
                said = (
                    f"weight {error} differs from that in training: the files have changed or been damaged; "
                    "delete this checkpoint to go back to the one before"
                )
                raise RunError(Problem("checkpoint", self.source, said)) from error
        return left


def retire(target: Path) -> None:
    """Move a model of an older checkpoint aside, so that the new one can be published by rename."""
    if target.exists():
        number = 1
        while (aside := target.with_name(f"{target.name}.{number}")).exists():
            number += 1
        target.rename(aside)
        log.info(f"the model that was there is now {aside}")


def workers(cpus: int | None = None) -> int:
    """Threads for so many CPUs, or those of this process. Four at least: some wait for the disk while others work (cold, on
    2 CPUs, 4 took two thirds of the time of 2, and 8 that of 4). More than 32 do not help a disk."""
    return min(32, max(4, cpus or len(os.sched_getaffinity(0))))
