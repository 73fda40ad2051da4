"""The workers: each takes a source tensor, reads it block by block, casts, adds and writes. Memory is workers x a few chunks."""

import hashlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from jobs.consolidation.plan import Placed, Plan, Task
from jobs.tensor_io.dtypes import FP32, Cast, Dtype, as_bytes, as_tensor, best_cast
from jobs.tensor_io.layout import blocks
from jobs.tensor_io.reader import CHUNK, Check, Files, Reader, write

if TYPE_CHECKING:
    from jobs.consolidation.lora import Nf4

EMPTY = xxhash.xxh3_64().hexdigest()
"""Checksum of a tensor without elements."""


class Worker:
    """Buffers of one thread."""

    def __init__(
        self, files: Files, folder: Path, cast: Cast, moved: Callable[[int], None], stop: threading.Event
    ) -> None:
        self.files, self.folder, self.cast, self.moved, self.stop = files, folder, cast, moved, stop
        self.reader = Reader(files, drop_cache=True)
        self.spaces = [np.empty(CHUNK, np.uint8) for _ in range(3)]

    def run(self, task: Task, skip: set[str]) -> dict[str, str]:
        """Carry a task out; returns the XXH3 of each output written. Files in `skip` are there already, or another's.

        Raises Differs where what passed is not what training recorded.
        """
        if task.placed and all(item.file in skip for item in task.placed):
            return {}
        seen = hashlib.sha256() if task.sha256 else None
        rounded = self._scales(task)
        goals = {item.output.start: item for item in task.placed if item.output.numel and item.file not in skip}
        sums: dict[str, str] = {}
        for begin, end in self._spans(task):
            goal = goals.get(begin)
            if goal is None and seen is None:
                continue
            total = self._span(task, begin, end, goal, seen, rounded)
            if goal is not None:
                sums[goal.output.name] = total
        if seen is not None and not self.stop.is_set() and seen.hexdigest() != task.sha256:
            raise Differs(task.name)
        return sums

    def _scales(self, task: Task) -> "Nf4 | None":
        """A first pass over a weight that training had in 4 bits: its scales depend on all of it."""
        if task.packed is None:
            return None
        from jobs.consolidation.lora import Nf4

        made, numel = Nf4(task.packed.torch), task.stored.numel
        self.reader.drop_cache = False
        for start, stop in blocks(0, numel, 1, CHUNK // 4):
            block = self._space(0, stop - start, task.stored.dtype)
            self.reader.fill(task.stored, start, block)
            made.look(as_tensor(block, task.stored.dtype))
        made.settle()
        self.reader.drop_cache = True
        return made

    def _span(self, task: Task, begin: int, end: int, goal: Placed | None, seen: Any, rounded: "Nf4 | None") -> str:
        """Move the elements of one output, or just look at them; returns the XXH3 of what was written."""
        stored, total = task.stored, xxhash.xxh3_64()
        width = task.update.a.shape[1] if task.update else stored.width
        width = math.lcm(width, rounded.block) if rounded else width  # whole rows, and whole blocks of NF4
        limit = CHUNK // max(stored.dtype.itemsize, 4, goal.output.dtype.itemsize if goal else 0)
        for start, stop in blocks(begin, end, width, limit):
            if self.stop.is_set():
                break
            block = self._space(0, stop - start, stored.dtype)
            self.reader.fill(stored, start, block)
            if seen is not None:
                seen.update(self.cast(block, stored.dtype, FP32, self._space(1, stop - start, FP32)))
            if goal is not None:
                view = memoryview(self._made(task, block, start, goal.output.dtype, rounded))
                total.update(view)
                at = goal.offset + (start - begin) * goal.output.dtype.itemsize
                write(self.files.open(str(self.folder / goal.file), os.O_RDWR), at, view)
            self.moved((stop - start) * stored.dtype.itemsize)
        return str(total.hexdigest())

    def _spans(self, task: Task) -> list[tuple[int, int]]:
        """The outputs of the task and what lies between them, which only a fingerprint needs."""
        edges = {0, task.stored.numel}
        for item in task.placed:
            edges |= {item.output.start, item.output.start + item.output.numel}
        ordered = sorted(edges)
        return list(zip(ordered, ordered[1:], strict=False))

    def _made(self, task: Task, block: np.ndarray, start: int, dtype: Dtype, rounded: "Nf4 | None") -> np.ndarray:
        """The bytes of the block as they are written."""
        count = block.size // task.stored.dtype.itemsize
        if task.update is not None or rounded is not None:
            pass

            block = applied(task, block, start, rounded, self._space(1, count, FP32))
        return self.cast(block, task.has, dtype, self._space(2, count, dtype))

    def _space(self, number: int, count: int, dtype: Dtype) -> np.ndarray:
        size = count * dtype.itemsize
        if self.spaces[number].size < size:  # a row of a merged weight that is longer than a chunk
            self.spaces[number] = np.empty(size, np.uint8)
        return self.spaces[number][:size]


class Differs(Exception):
    """Raised for a weight that is not what training recorded; its name is the argument."""


class Ledger:
    """Which outputs of each file are written; a file is flushed and recorded by the worker that wrote its last one."""

    def __init__(
        self, plan: Plan, folder: Path, skip: set[str], finished: Callable[[str, dict[str, str]], None]
    ) -> None:
        self.folder, self.finished, self.lock = folder, finished, threading.Lock()
        self.sums: dict[str, dict[str, str]] = {file: {} for file in plan.sizes if file not in skip}
        self.left = {file: 0 for file in self.sums}
        for task in plan.tasks:
            for file in self._files(task):
                self.left[file] += 1

    def _files(self, task: Task) -> set[str]:
        return {item.file for item in task.placed} & self.sums.keys()

    def done(self, task: Task, sums: dict[str, str], files: Files) -> None:
        """A task is carried out, and what it wrote is what training recorded."""
        for file in self._files(task):
            with self.lock:
                for item in task.placed:
                    if item.file == file:
                        self.sums[file][item.output.name] = sums.get(item.output.name, EMPTY)
                self.left[file] -= 1
                last = self.left[file] == 0
            if last:
                os.fsync(files.open(str(self.folder / file), os.O_RDWR))
                self.finished(file, self.sums[file])


TOGETHER = 4
"""Files that are written at the same time. One writer at a time holds a file's lock in the kernel, so one file is as fast as one
core; and these are what a kill loses."""


def interleaved(plan: Plan, skip: set[str]) -> list[Task]:
    """The tasks in the order of their files, but of so many files in turn."""
    lines: dict[str, list[Task]] = {}
    for task in plan.tasks:
        lines.setdefault(next((item.file for item in task.placed if item.file not in skip), ""), []).append(task)
    every = list(lines.values())
    groups = (every[start : start + TOGETHER] for start in range(0, len(every), TOGETHER))
    return [task for group in groups for turn in zip_longest(*group) for task in turn if task is not None]


def carry_out(
    plan: Plan,
    folder: Path,
    workers: int,
    skip: set[str],
    moved: Callable[[int], None],
    finished: Callable[[str, dict[str, str]], None],
    check: Check | None = None,
) -> None:
    """Run every task on `workers` threads; `finished(file, checksums)` as soon as a file is written and flushed."""
    files, stop, own = Files(check), threading.Event(), threading.local()
    ledger = Ledger(plan, folder, skip, finished)
    casts = {(task.has, item.output.dtype) for task in plan.tasks for item in task.placed}
    casts |= {(task.stored.dtype, FP32) for task in plan.tasks if task.sha256}

    def one(task: Task) -> None:
        if not hasattr(own, "worker"):
            own.worker = Worker(files, folder, cast, moved, stop)
        try:
            found = own.worker.run(task, skip)
            if not stop.is_set():
                ledger.done(task, found, files)
        except BaseException:
            stop.set()
            raise

    try:
        with best_cast(casts, plan.read_bytes) as cast, ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(one, task) for task in interleaved(plan, skip)]
            wait(futures, return_when=FIRST_EXCEPTION)
            if stop.is_set():
                pool.shutdown(cancel_futures=True)
            for future in futures:
                if not future.cancelled():
                    future.result()
    finally:
        stop.set()
        files.close()


def applied(task: Task, block: np.ndarray, start: int, rounded: "Nf4 | None", room: np.ndarray) -> np.ndarray:
    """Bytes of a source's elements from `start` on, as training had them and with what was learnt added to them: of `task.has`.

    `room` has four bytes an element.
    """
    found = as_tensor(block, task.stored.dtype)
    if rounded is not None:
        found = rounded.round(found, start)
    if task.update is None:
        return as_bytes(found)
    wide, width = as_tensor(room, FP32), task.update.a.shape[1]
    wide.copy_(found)
    from jobs.consolidation.lora import add  # imports torch

    add(wide.view(-1, width), task.update, start // width)
    return room
