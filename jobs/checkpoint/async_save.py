"""Checkpoints on their way to disk: copied to host memory, written by a thread while training goes on, published steps later."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import Config
from jobs.backends import Engine, host_staging
from jobs.checkpoint import checkpointing
from jobs.checkpoint.checkpointing import Part
from jobs.checkpoint.paths import folder
from jobs.distributed.process_group import World
from jobs.monitoring.metrics import Metrics


@dataclass
class _Pending:
    """A checkpoint that a thread of each rank is writing."""

    step: int
    about: dict[str, Any]
    blocked_s: float
    thread: threading.Thread
    outcome: list[Callable[[], Part]]
    """Once it is through: what gives its result, or raises its error."""


class Saver:
    """Saves for a training, with at most one checkpoint on its way. All ranks call its methods together, but `written`.

    A checkpoint is published by agreement of all ranks: once all have written it, before the next, and at the end. Until
    then nothing but a hidden folder is there, so a crash leaves the one before.
    """

    def __init__(self, config: Config, world: World, metrics: Metrics) -> None:
        self.config, self.world, self.metrics = config, world, metrics
        self._pending: _Pending | None = None
        self._copied = False
        self._stager: host_staging.Stager | None = None
        self._group: dist.ProcessGroup | None = None
        if config.train.async_save:
            self._stager = host_staging.Stager(world.device)
            # of its own: the thread's collectives must not come between those of training
            # No time-out to speak of: training goes on meanwhile, and where it then waits in vain the watchdog says for whom
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    @property
    def written(self) -> bool:
        """Whether this rank is through with the one on its way."""
        return self._pending is not None and not self._pending.thread.is_alive()

    def prepare(self, backend: ModuleType, engine: Engine) -> None:
        """Begin to take the host memory of copies; all that will be saved must be there, as it is after a step."""
        if self._in_background(checkpointing.expected_bytes(engine.module) // self.world.size):
            assert self._stager
            self._stager.prepare(backend.storages(engine))

    def save(self, backend: ModuleType, engine: Engine, step: int, about: dict[str, Any], *, wait: bool) -> Path:
        """Begin the checkpoint of `step`, and with `wait` also publish it; returns where it is, or will be."""
        self.settle()
        began, world = time.perf_counter(), self.world
        size = checkpointing.expected_bytes(engine.module)
        beside = checkpointing.begin(self.config, step, world, size)
        if beside is None:
            return checkpointing.place(self.config, step)
        if not wait and self._in_background(size // world.size):
            write = backend.staged(engine, beside, self._stager, self._group)
            self._start(step, about, began, lambda: checkpointing.written(beside, write, world.rank))
        else:
            ended = checkpointing.finish(
                self.config,
                step,
                world,
                lambda: checkpointing.written(beside, lambda: backend.save(engine, beside), world.rank),
                about,
            )
            self._say(step, ended, time.perf_counter() - began)
        return checkpointing.place(self.config, step)

    def settle(self) -> None:
        """Publish what is on its way; waits for it. Raises as a save without a thread does."""
        if self._pending is None:
            return
        began, pending = time.perf_counter(), self._pending
        pending.thread.join()
        self._pending = None
        ended = checkpointing.finish(self.config, pending.step, self.world, pending.outcome[0], pending.about)
        self._say(pending.step, ended, pending.blocked_s + time.perf_counter() - began)

    def _in_background(self, rank_bytes: int) -> bool:
        """Looked at before the first copy; after that its room is taken."""
        if self._stager is None or self._group is None:
            return False
        if not self._copied and not host_staging.fits(rank_bytes, self.world):
            self.metrics.log_lines(["checkpoints are written while training waits: host memory has no room for a copy"])
            self._stager = None
            return False
        self._copied = True
        return True

    def _start(self, step: int, about: dict[str, Any], began: float, work: Callable[[], Part]) -> None:
        outcome: list[Callable[[], Part]] = []

        def run() -> None:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # a thread begins on the first GPU, and would open it too
            try:
                part = work()
                outcome.append(lambda: part)
            except BaseException as error:  # DCP's own is no Exception
                outcome.append(_raising(error))

        thread = threading.Thread(target=run, name=f"checkpoint-{step}", daemon=True)  # a failing job waits for none
        thread.start()
        self._pending = _Pending(step, about, time.perf_counter() - began, thread, outcome)

    def _say(self, step: int, ended: checkpointing.Written, blocked_s: float) -> None:
        rate = ended.bytes / 1e9 / max(1e-9, ended.seconds)
        self.metrics.note(checkpoint_s=round(blocked_s, 3), checkpoint_gb_per_s=round(rate, 3))
        size = f"{ended.bytes / 1e9:.3g} GB in {ended.seconds:.1f} s ({rate:.2f} GB/s)"
        where = checkpointing.place(self.config, step).relative_to(folder(self.config))
        self.metrics.log_lines([f"saved     {where}: {size}, training waited {blocked_s:.1f} s"])


def _raising(error: BaseException) -> Callable[[], Part]:
    def fail() -> Part:
        raise error

    return fail
