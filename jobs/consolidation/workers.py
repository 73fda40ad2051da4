"""The threads of a merge: each reads a source tensor in blocks, casts them, adds adapters and writes. A thread holds few chunks."""

import hashlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from jobs.consolidation.output_folder import Checksums
from jobs.consolidation.plan import PlacedOutput, Plan, Task
from jobs.tensor_io.dtypes import FP32, Bytes, Cast, Dtype, as_bytes, as_tensor, best_cast
from jobs.tensor_io.layout import blocks
from jobs.tensor_io.reader import CHUNK, Check, OpenFiles, Reader, write

if TYPE_CHECKING:
    import torch

    from jobs.consolidation.lora import Nf4Rounder

EMPTY_CHECKSUM = xxhash.xxh3_64().hexdigest()
"""Checksum of a tensor without elements."""
SOURCE, WIDE, RESULT = range(3)
"""A worker's buffers: bytes as they are stored, in fp32, as they are written."""


class FingerprintMismatch(Exception):
    """Raised for a weight that is not what training recorded; its name is the argument."""


class Worker:
    """The buffers of one thread, and how it carries out a task."""

    def __init__(
        self, files: OpenFiles, folder: Path, cast: Cast, moved: Callable[[int], None], stop: threading.Event
    ) -> None:
        self.files, self.folder, self.cast, self.moved, self.stop = files, folder, cast, moved, stop
        self.reader = Reader(files, drop_cache=True)
        self.buffers = [np.empty(CHUNK, np.uint8) for _ in (SOURCE, WIDE, RESULT)]

    def run(self, task: Task, skip: set[str]) -> dict[str, str]:
        """Returns the XXH3 of each output that was written. Files in `skip` are finished, or those of another rank.

        Raises FingerprintMismatch if the weight is not what training recorded.
        """
        if task.placed and all(item.file in skip for item in task.placed):
            return {}
        fingerprint = hashlib.sha256() if task.sha256 else None
        nf4, norms = self._nf4_scales(task), self._column_norms(task)
        outputs = {item.output.start: item for item in task.placed if item.output.numel and item.file not in skip}
        checksums: dict[str, str] = {}
        for begin, end in _output_ranges(task):
            output = outputs.get(begin)
            if output is None and fingerprint is None:
                continue
            checksum = self._move(task, begin, end, output, fingerprint, nf4, norms)
            if output is not None:
                checksums[output.output.name] = checksum
        if fingerprint is not None and not self.stop.is_set() and fingerprint.hexdigest() != task.sha256:
            raise FingerprintMismatch(task.name)
        return checksums

    def _nf4_scales(self, task: Task) -> "Nf4Rounder | None":
        """Reads a weight that training had in NF4 a first time: its scales depend on all elements."""
        if task.nf4_compute is None:
            return None
        from jobs.consolidation.lora import Nf4Rounder

        nf4, numel = Nf4Rounder(task.nf4_compute.torch), task.stored.numel
        self.reader.drop_cache = False  # it is read a second time at once
        for start, stop in blocks(0, numel, 1, CHUNK // 4):
            block = self._buffer(SOURCE, stop - start, task.stored.dtype)
            self.reader.fill(task.stored, start, block)
            nf4.collect_scales(as_tensor(block, task.stored.dtype))
        nf4.finish_scales()
        self.reader.drop_cache = True
        return nf4

    def _column_norms(self, task: Task) -> "torch.Tensor | None":
        """Reads a weight whose adapter sets the norms of columns (DoRA on a transposed weight) a first time."""
        if task.update is None or not task.update.of_columns:
            return None
        from jobs.consolidation.lora import ColumnNorms

        total, width = ColumnNorms(task.update), task.update.a.shape[1]
        self.reader.drop_cache = False
        for start, stop in blocks(0, task.stored.numel, width, max(width, CHUNK // 4)):
            block = self._buffer(SOURCE, stop - start, task.stored.dtype)
            self.reader.fill(task.stored, start, block)
            wide = as_tensor(self._buffer(WIDE, stop - start, FP32), FP32)
            wide.copy_(as_tensor(block, task.stored.dtype))
            total.collect(wide.view(-1, width), start // width)
        self.reader.drop_cache = True
        return total.norms()

    def _move(
        self,
        task: Task,
        begin: int,
        end: int,
        placed: PlacedOutput | None,
        fingerprint: Any,
        nf4: "Nf4Rounder | None",
        norms: "torch.Tensor | None",
    ) -> str:
        """Read the elements `begin` to `end`, add them to the fingerprint, write them as an output; returns the output's XXH3."""
        stored, checksum = task.stored, xxhash.xxh3_64()
        width = task.update.a.shape[1] if task.update else stored.width
        width = math.lcm(width, nf4.block) if nf4 else width  # whole rows for an adapter, whole blocks for NF4
        limit = CHUNK // max(stored.dtype.itemsize, 4, placed.output.dtype.itemsize if placed else 0)
        for start, stop in blocks(begin, end, width, limit):
            if self.stop.is_set():
                break
            block = self._buffer(SOURCE, stop - start, stored.dtype)
            self.reader.fill(stored, start, block)
            if fingerprint is not None:
                fingerprint.update(self.cast(block, stored.dtype, FP32, self._buffer(WIDE, stop - start, FP32)))
            if placed is not None:
                view = self._output_bytes(task, block, start, placed.output.dtype, nf4, norms).data
                checksum.update(view)
                offset = placed.offset + (start - begin) * placed.output.dtype.itemsize
                write(self.files.open(str(self.folder / placed.file), os.O_RDWR), offset, view)
            self.moved((stop - start) * stored.file_bytes // stored.numel)
        return str(checksum.hexdigest())

    def _output_bytes(
        self,
        task: Task,
        block: Bytes,
        start: int,
        dtype: Dtype,
        nf4: "Nf4Rounder | None",
        norms: "torch.Tensor | None",
    ) -> Bytes:
        """The bytes of a block as they are written."""
        count = block.size // task.stored.dtype.itemsize
        if task.update is not None or nf4 is not None:
            block = apply_update(task, block, start, nf4, norms, self._buffer(WIDE, count, FP32))
        elif task.rounded is not None:
            block = self.cast(block, task.stored.dtype, task.rounded, self._buffer(WIDE, count, task.rounded))
        return self.cast(block, task.dtype_before_cast, dtype, self._buffer(RESULT, count, dtype))

    def _buffer(self, number: int, count: int, dtype: Dtype) -> Bytes:
        size = count * dtype.itemsize
        if self.buffers[number].size < size:  # a row of a weight with an adapter may be longer than a chunk
            self.buffers[number] = np.empty(size, np.uint8)
        return self.buffers[number][:size]


def _output_ranges(task: Task) -> list[tuple[int, int]]:
    """(first element, last + 1) of the outputs of a task, and of the gaps between them, which only a fingerprint needs."""
    edges = {0, task.stored.numel}
    for item in task.placed:
        edges |= {item.output.start, item.output.start + item.output.numel}
    return list(pairwise(sorted(edges)))


class FileProgress:
    """Which outputs of each file are written. The worker that writes the last one flushes the file and records it."""

    def __init__(
        self, plan: Plan, folder: Path, skip: set[str], finished: Callable[[str, dict[str, str]], None]
    ) -> None:
        self.folder, self.finished, self.lock = folder, finished, threading.Lock()
        self.checksums: Checksums = {file: {} for file in plan.sizes if file not in skip}
        self.tasks_left = dict.fromkeys(self.checksums, 0)
        for task in plan.tasks:
            for file in self._files(task):
                self.tasks_left[file] += 1

    def _files(self, task: Task) -> set[str]:
        return {item.file for item in task.placed} & self.checksums.keys()

    def task_done(self, task: Task, checksums: dict[str, str], files: OpenFiles) -> None:
        """Call it only once the fingerprint of the task is compared: a recorded file is not written again."""
        for file in self._files(task):
            with self.lock:
                for item in task.placed:
                    if item.file == file:
                        self.checksums[file][item.output.name] = checksums.get(item.output.name, EMPTY_CHECKSUM)
                self.tasks_left[file] -= 1
                is_last = self.tasks_left[file] == 0
            if is_last:
                os.fsync(files.open(str(self.folder / file), os.O_RDWR))
                self.finished(file, self.checksums[file])


FILES_AT_ONCE = 4
"""Files that are written at the same time. The kernel locks a file for one writer at a time, so a single file is only as fast as
one core. More files would mean that a kill loses more."""


def interleaved(plan: Plan, skip: set[str]) -> list[Task]:
    """The tasks in the order of their files, but taking turns between FILES_AT_ONCE files."""
    tasks_of_file: dict[str, list[Task]] = {}
    for task in plan.tasks:
        first_file = next((item.file for item in task.placed if item.file not in skip), "")
        tasks_of_file.setdefault(first_file, []).append(task)
    queues = list(tasks_of_file.values())
    groups = (queues[start : start + FILES_AT_ONCE] for start in range(0, len(queues), FILES_AT_ONCE))
    return [task for group in groups for turn in zip_longest(*group) for task in turn if task is not None]


def run_tasks(
    plan: Plan,
    folder: Path,
    workers: int,
    skip: set[str],
    *,
    moved: Callable[[int], None],
    finished: Callable[[str, dict[str, str]], None],
    check: Check | None = None,
) -> None:
    """Run every task on `workers` threads; calls `moved(bytes read)`, and `finished(file, checksums)` when a file is flushed.

    The first error stops all workers and is raised: FingerprintMismatch, RunError or OSError.
    """
    files, stop, of_thread = OpenFiles(check), threading.Event(), threading.local()
    progress = FileProgress(plan, folder, skip, finished)
    casts = {(task.dtype_before_cast, item.output.dtype) for task in plan.tasks for item in task.placed}
    casts |= {(task.stored.dtype, FP32) for task in plan.tasks if task.sha256}
    casts |= {(task.stored.dtype, task.rounded) for task in plan.tasks if task.rounded}
    if any(task.stored.is_quantized for task in plan.tasks):
        import torch  # noqa: F401 -- `dequantize` needs it, and casts are then faster with it

    def run_task(task: Task) -> None:
        if not hasattr(of_thread, "worker"):
            of_thread.worker = Worker(files, folder, cast, moved, stop)
        try:
            checksums = of_thread.worker.run(task, skip)
            if not stop.is_set():
                progress.task_done(task, checksums, files)
        except BaseException:
            stop.set()
            raise

    try:
        with best_cast(casts, plan.read_bytes) as cast, ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(run_task, task) for task in interleaved(plan, skip)]
            wait(futures, return_when=FIRST_EXCEPTION)
            if stop.is_set():
                pool.shutdown(cancel_futures=True)
            for future in futures:
                if not future.cancelled():
                    future.result()
    finally:
        stop.set()
        files.close()


def apply_update(
    task: Task, block: Bytes, start: int, nf4: "Nf4Rounder | None", norms: "torch.Tensor | None", output: Bytes
) -> Bytes:
    """Elements of a source from `start` on, rounded to NF4 if training had them so, plus the adapter; in `dtype_before_cast`.

    `output` has four bytes per element.
    """
    elements = as_tensor(block, task.stored.dtype)
    if nf4 is not None:
        elements = nf4.round(elements, start)
    if task.update is None:
        return as_bytes(elements)
    from jobs.consolidation.lora import add  # imports torch

    wide, width = as_tensor(output, FP32), task.update.a.shape[1]
    wide.copy_(elements)
    add(wide.view(-1, width), task.update, start // width, norms)
    return output
