"""Saves checkpoints in the background: copies the state to host memory, and a thread writes it while training goes on."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import Config
from jobs.backends import Backend, Engine, host_staging
from jobs.checkpoint import checkpointing
from jobs.checkpoint.checkpointing import RankFiles
from jobs.checkpoint.paths import checkpoints_folder
from jobs.distributed.process_group import World
from jobs.monitoring.metrics import Metrics


@dataclass
class _Pending:
    """A checkpoint that a thread of each rank is writing."""

    step: int
    info: dict[str, Any]
    blocked_s: float
    thread: threading.Thread
    outcome: list[Callable[[], RankFiles]]
    """Empty while the thread works. Then one function, which returns the thread's result or raises its error."""


class Saver:
    """Saves the checkpoints of one training, with at most one being written in the background.

    All ranks call its methods together, except `written`. A checkpoint is published once all ranks have written it, at the latest
    before the next save and at the end. Until then it is a hidden folder, so after a crash the earlier checkpoint is still there.
    """

    def __init__(self, config: Config, world: World, metrics: Metrics) -> None:
        self.config, self.world, self.metrics = config, world, metrics
        self._pending: _Pending | None = None
        self._copied = False
        self._stager: host_staging.Stager | None = None
        self._group: dist.ProcessGroup | None = None
        if config.train.async_save:
            self._stager = host_staging.Stager(world.device)
            # A group for the threads alone: their collectives must not mix with those of training. Its time-out of a day
            # never ends a rank in practice: if training waits for a rank that does not answer, the watchdog names that rank.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    @property
    def written(self) -> bool:
        """Whether this rank has written the checkpoint that is not published yet."""
        return self._pending is not None and not self._pending.thread.is_alive()

    def prepare(self, backend: Backend, engine: Engine) -> None:
        """Start allocating the host memory for copies. Call it after a step: only then the optimizer has its state."""
        if self._in_background(checkpointing.expected_bytes(engine.module, self.config) // self.world.size):
            assert self._stager
            self._stager.prepare(backend.storage_bytes(engine))

    def save(self, backend: Backend, engine: Engine, step: int, info: dict[str, Any], *, wait: bool) -> Path:
        """Start the checkpoint of `step`; with `wait`, also finish and publish it. Returns the path of the published checkpoint."""
        self.publish_pending()
        began, world = time.perf_counter(), self.world
        size = checkpointing.expected_bytes(engine.module, self.config)
        hidden = checkpointing.begin(self.config, step, world, size)
        if hidden is None:
            return checkpointing.step_folder(self.config, step)
        if not wait and self._in_background(size // world.size):
            assert self._stager and self._group
            write = backend.stage(engine, hidden, self._stager, self._group)
            self._start(step, info, began, lambda: checkpointing.write_shards(hidden, write, world.rank))
        else:
            written = checkpointing.finish(
                self.config,
                step,
                world,
                lambda: checkpointing.write_shards(hidden, lambda: backend.save(engine, hidden), world.rank),
                info,
            )
            self._report(step, written, time.perf_counter() - began)
        return checkpointing.step_folder(self.config, step)

    def publish_pending(self) -> None:
        """Wait for the checkpoint in the background, if any, and publish it. Raises the errors of `checkpointing.finish`."""
        if self._pending is None:
            return
        began, pending = time.perf_counter(), self._pending
        pending.thread.join()
        self._pending = None
        written = checkpointing.finish(self.config, pending.step, self.world, pending.outcome[0], pending.info)
        self._report(pending.step, written, pending.blocked_s + time.perf_counter() - began)

    def _in_background(self, rank_bytes: int) -> bool:
        """Whether saves run in the background. Free memory is checked before the first copy only; later the copy has its memory."""
        if self._stager is None or self._group is None:
            return False
        if not self._copied and not host_staging.fits_in_host_memory(rank_bytes, self.world):
            self.metrics.log_lines(
                ["training waits while checkpoints are written: host memory is too small for a copy of the state"]
            )
            self._stager = None
            return False
        self._copied = True
        return True

    def _start(self, step: int, info: dict[str, Any], began: float, work: Callable[[], RankFiles]) -> None:
        outcome: list[Callable[[], RankFiles]] = []

        def run() -> None:
            if self.world.device.type == "cuda":
                # a new thread uses GPU 0, and would create a CUDA context there
                torch.cuda.set_device(self.world.device)
            try:
                files = work()
                outcome.append(lambda: files)
            except BaseException as error:  # DCP's CheckpointException is not an Exception
                outcome.append(_raise_later(error))

        # daemon: a job that fails does not wait for it
        thread = threading.Thread(target=run, name=f"checkpoint-{step}", daemon=True)
        thread.start()
        self._pending = _Pending(step, info, time.perf_counter() - began, thread, outcome)

    def _report(self, step: int, written: checkpointing.Written, blocked_s: float) -> None:
        rate = written.bytes / 1e9 / max(1e-9, written.seconds)
        self.metrics.add_to_next_line(checkpoint_s=round(blocked_s, 3), checkpoint_gb_per_s=round(rate, 3))
        size = f"{written.bytes / 1e9:.3g} GB in {written.seconds:.1f} s ({rate:.2f} GB/s)"
        path = checkpointing.step_folder(self.config, step).relative_to(checkpoints_folder(self.config))
        self.metrics.log_lines([f"saved     {path}: {size}, training waited {blocked_s:.1f} s"])


def _raise_later(error: BaseException) -> Callable[[], RankFiles]:
    def raise_it() -> RankFiles:
        raise error

    return raise_it
