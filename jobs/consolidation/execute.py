"""Carries out a plan: checks free space, writes what is not finished, reads it back, adds config and model card, publishes."""

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
from jobs.consolidation import estimate, output_folder, workers
from jobs.consolidation.output_folder import Checksums
from jobs.consolidation.plan import Plan
from jobs.consolidation.rank_coordinator import RankCoordinator
from jobs.tensor_io.reader import Check

log = logging.getLogger(__name__)

MIN_WORKERS, MAX_WORKERS = 4, 32


def execute(
    plan: Plan,
    target: Path,
    *,
    threads: int,
    checkpoint: Path,
    describe: Callable[[Path], None],
    muster_json: dict[str, Any],
    check: Check | None = None,
    verified: bool = True,
) -> None:
    """Write, verify and publish `target`; a folder that is already there is moved aside.

    `describe` writes the files beside the weights into the folder that it is given. `check` is called before bytes of the
    checkpoint are read. `verified` is false if nothing said which weights the model has. Other ranks of the job call this
    function with the same plan, and write their share of the files. Raises RunError, also when `check` does, or when a weight
    is not what training recorded.
    """
    with RankCoordinator(target) as coordinator:
        writer = _RankWriter(plan, threads, checkpoint, check, coordinator)
        if coordinator.rank:
            assignment = coordinator.wait_for_assignment(plan)
            coordinator.report_done(writer.write(partial(target), assignment.rank_of_file, assignment.finished))
            return
        with output_folder.locked_partial_folder(target, coordinator.alone) as folder:
            finished = output_folder.find_finished(folder, plan)
            if finished:
                log.info(f"{len(finished)} of {len(plan.sizes)} files were finished by an earlier start, and are kept")
            output_folder.check_free_space(folder, plan, finished)
            for line in estimate.describe(plan, threads, folder, coordinator.size):
                log.info(line)
            rank_of_file = coordinator.assign_files(plan, set(finished))
            checksums = writer.write(folder, rank_of_file, set(finished)) | coordinator.wait_for_all()
            describe(folder)
            move_aside(target)
            checksums = {name: dict(sorted(checksums[name].items())) for name in plan.sizes}
            output_folder.publish_result(folder, target, plan, muster_json | {"xxh3": checksums}, verified)
    if compared := sum(task.sha256 is not None for task in plan.tasks):
        log.info(f"{compared} weights equal those in training, bit for bit")


@dataclass(frozen=True)
class _RankWriter:
    """What this rank needs to write its share of the files."""

    plan: Plan
    threads: int
    checkpoint: Path
    check: Check | None
    coordinator: RankCoordinator

    def write(self, folder: Path, rank_of_file: dict[str, int], finished: set[str]) -> Checksums:
        """Write this rank's files that are not finished, and read all of its files back. Returns their checksums."""
        plan, rank, ranks = self.plan, self.coordinator.rank, self.coordinator.size
        began = time.perf_counter()
        own_files = {name for name, owner in rank_of_file.items() if owner == rank}
        checksums = {name: output_folder.read_record(folder, name) for name in own_files & finished}
        output_folder.create_files(folder, plan, own_files - finished)
        # a source without outputs is only compared with its fingerprint; one rank does that
        tasks = [task for number, task in enumerate(plan.tasks) if task.placed or number % ranks == rank]
        skip = (rank_of_file.keys() - own_files) | finished
        read_bytes = self._run_tasks(replace(plan, tasks=tuple(tasks)), folder, checksums, skip)
        seconds = time.perf_counter() - began
        log.info(f"reading {len(own_files)} files back")
        tensors = output_folder.read_back(folder, plan, checksums, self.threads)
        written_bytes = sum(plan.sizes[name] for name in own_files - finished)
        log.info(
            f"read {read_bytes / 1e9:.2f} GB and wrote {written_bytes / 1e9:.2f} GB in {seconds:.1f} s "
            f"with {self.threads} workers, {(read_bytes + written_bytes) / 1e9 / seconds:.2f} GB/s; "
            f"{tensors} tensors read back in {time.perf_counter() - began - seconds:.1f} s"
        )
        return checksums

    def _run_tasks(self, plan: Plan, folder: Path, checksums: Checksums, skip: set[str]) -> int:
        """Run the tasks of files that are not in `skip`; adds to `checksums`, and returns the bytes that had to be read."""
        lock = threading.Lock()
        read_bytes = sum(
            task.stored.file_bytes
            for task in plan.tasks
            if not task.placed or {item.file for item in task.placed} - skip
        )
        with tqdm(
            total=read_bytes, desc="weights", unit="B", unit_scale=True, mininterval=1 if sys.stderr.isatty() else 10
        ) as bar:

            def moved(count: int) -> None:
                with lock:
                    bar.update(count)

            def finished(name: str, of_tensors: dict[str, str]) -> None:
                output_folder.write_record(folder, name, of_tensors)
                checksums[name] = of_tensors

            try:
                workers.run_tasks(plan, folder, self.threads, skip, moved=moved, finished=finished, check=self.check)
            except workers.FingerprintMismatch as error:
                message = (
                    f"weight {error} differs from that in training: the files have changed or been damaged; "
                    "delete this checkpoint to go back to the one before"
                )
                raise RunError(Problem("checkpoint", self.checkpoint, message)) from error
        return read_bytes


def move_aside(target: Path) -> None:
    """Rename an existing result to TARGET.1 (2, 3, ...), so that the new one can be published by a rename."""
    if target.exists():
        number = 1
        while (aside := target.with_name(f"{target.name}.{number}")).exists():
            number += 1
        target.rename(aside)
        log.info(f"moved the older model to {aside}")


def worker_count(cpus: int | None = None) -> int:
    """Number of threads for `cpus` CPUs, by default for those of this process: at least 4, at most 32.

    Some threads wait for the disk while others work. With a cold cache on 2 CPUs, 4 threads took two thirds of the time of 2,
    and 8 the same as 4. A disk is not faster with more than 32.
    """
    return min(MAX_WORKERS, max(MIN_WORKERS, cpus or len(os.sched_getaffinity(0))))
