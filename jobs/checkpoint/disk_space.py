"""Checks before the first step that the disk of the run folder can hold the checkpoints to come and the merged model."""

import bisect
import ctypes
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from conf.choices import OutputDtype
from conf.errors import Problem, RunError
from conf.schema import Config
from jobs.checkpoint.checkpointing import expected_bytes
from jobs.checkpoint.paths import checkpoints_folder, published_checkpoints, step_of
from jobs.distributed.collectives import broadcast_from_rank0, gather
from jobs.distributed.process_group import World
from jobs.model import saved_modules

log = logging.getLogger(__name__)

GIB = 2**30
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a system that has the space, but not for this user. Any other one says that it cannot reserve."""
RESERVE_S = 10
"""Seconds after which a rank reserves no more: a file system may be slow at that."""


@dataclass(frozen=True)
class Plan:
    """What a run writes to its folder from now on."""

    checkpoint: int
    """Bytes of one checkpoint, all ranks together."""
    merged: int
    """Bytes of RUN/model."""
    existing: tuple[int, ...]
    """Steps of the checkpoints that are there, oldest first."""
    last_step: int | None
    """None if the length of training is not known yet. Then one more checkpoint is expected."""

    def saves(self, config: Config) -> list[int]:
        """The steps at which checkpoints are still to be saved."""
        done = self.existing[-1] if self.existing else 0
        if self.last_step is None:
            return [done + 1]
        if done >= self.last_step:
            return []
        every = config.train.save_every
        first = every * (done // every + 1) if every else self.last_step
        return [*range(first, self.last_step, every or 1), self.last_step]

    def at_once(self, config: Config, keep: int = 1) -> tuple[int, int]:
        """Checkpoints on the disk (while the last one is written, after that), if the `keep` newest and the milestones stay."""
        steps, every = [*self.existing, *self.saves(config)], config.train.keep_every
        milestones = {step for step in steps[:-1] if every and step % every == 0}
        return len(milestones | set(steps[-keep - 1 : -1])) + 1, len(milestones | set(steps[-keep:]))

    def needed(self, config: Config, keep: int = 1) -> int:
        """Most bytes on the disk at the same time. The model is merged after training."""
        during, after = self.at_once(config, keep)
        merged = self.merged if "consolidate" in config.jobs else 0
        return max(during * self.checkpoint, after * self.checkpoint + merged)


def check(config: Config, model: Callable[[], nn.Module], world: World, last_step: int | None) -> None:
    """Raise RunError on all ranks if the checkpoints that are still to be saved, or the merged model, cannot fit.

    Only rank 0 calls `model`, which returns one that is not sharded yet; meta tensors are enough. Logs a warning if fewer
    checkpoints than `train.keep_checkpoints` fit. All ranks call this together.
    """
    to_reserve = broadcast_from_rank0(lambda: _check_free(config, model(), last_step))
    _try_to_reserve(config, to_reserve, world)


def _check_free(config: Config, model: nn.Module, last_step: int | None) -> int:
    """The bytes that this run must still be able to write at the least. Raises RunError if the disk has fewer."""
    folder = checkpoints_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    existing = tuple(sorted(step_of(path) for path in published_checkpoints(config)))
    plan = Plan(expected_bytes(model, config), _merged_bytes(config, model), existing, last_step)
    if not plan.saves(config):
        return 0
    written = sum(file.stat().st_size for file in folder.glob("step-*/**/*") if file.is_file())
    space = shutil.disk_usage(folder).free + written
    if (least := plan.needed(config)) > space:
        raise RunError(Problem("run_dir", config.run_dir, _too_small(config, plan, space)))
    keep = config.train.keep_checkpoints
    if (wanted := plan.needed(config, keep)) > space:
        fits = bisect.bisect_right(range(1, keep), space, key=lambda count: plan.needed(config, count))
        log.warning(
            f"disk: train.keep_checkpoints={keep} needs {_gib(wanted)} GiB in the run folder, of which {_gib(space)} GiB are "
            f"free, so fewer checkpoints are kept. train.keep_checkpoints={fits} fits"
        )
    return max(0, least - written)


def _too_small(config: Config, plan: Plan, space: int) -> str:
    """What does not fit into `space` bytes, and the settings of which each alone makes it fit."""
    during, after = plan.at_once(config)
    size = _gib(plan.checkpoint)
    parts = f"{during} checkpoints of {size} GiB at the same time" if during > 1 else f"a checkpoint of {size} GiB"
    if "consolidate" in config.jobs:
        parts += f", then {after} beside the merged model of {_gib(plan.merged)} GiB"
    settings = [words for words, changed in _smaller(config) if plan.needed(changed) <= space]
    return (
        f"its disk has {_gib(space)} GiB for this run, which needs at least {_gib(plan.needed(config))} GiB: {parts}. "
        + (f"Set {', or '.join(settings)}. Or free" if settings else "Free")
        + " space on this disk, or choose another run_dir"
    )


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """(what to type, the config with it) for settings that need less space."""
    changed = deepcopy(config)
    changed.train.keep_every = 0
    yield "train.keep_every=0", changed
    changed = deepcopy(changed)
    changed.train.save_every = 0
    yield "train.save_every=0 train.keep_every=0", changed
    changed = deepcopy(config)
    changed.jobs = [job for job in config.jobs if job != "consolidate"]
    yield "pipeline=train", changed


def _merged_bytes(config: Config, model: nn.Module) -> int:
    """Size of RUN/model: of all weights with the towers of a multimodal model, or of the adapter alone.

    A quantized weight counts as the matrix that it stands for.
    """
    dtype, shape = config.consolidate.dtype, config.model.architecture
    precision = config.train.precision.name if dtype is OutputDtype.auto else dtype.name
    adapter = {id(weight) for name, weight in model.named_parameters() if "lora_" in name or saved_modules.COPY in name}
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weights[id(module.weight)] = module.in_features * module.out_features
    chosen = [count for key, count in weights.items() if (key in adapter) is config.consolidate.adapter_only]
    towers = int(shape.tower_gib * GIB) if shape and not config.consolidate.adapter_only else 0
    return (4 if precision == "fp32" else 2) * sum(chosen) + towers


def _try_to_reserve(config: Config, to_reserve: int, world: World) -> None:
    """Reserve the space for a moment, each rank its part. Only this shows a quota of the user, which the free space does not."""
    with ExitStack() as files:
        numbers = gather(lambda: _reserve(files, checkpoints_folder(config), to_reserve // world.size))
    if refused := REFUSALS & set(numbers):
        message = (
            f"{_gib(to_reserve)} GiB for checkpoints cannot be written there ({os.strerror(refused.pop())}), although the disk has "
            "more free. Raise your quota or the limit of file sizes, delete files, or choose another run_dir"
        )
        raise RunError(Problem("run_dir", config.run_dir, message))


def _reserve(files: ExitStack, folder: Path, size: int) -> int:
    """Let a file without a name take `size` bytes, until `files` is closed. Returns the number of the system's error, 0 for none.

    os.posix_fallocate would write to every block where the file system cannot reserve; this call says so instead.
    """
    libc, ends = ctypes.CDLL(None, use_errno=True), time.monotonic() + RESERVE_S
    try:
        descriptor, path = tempfile.mkstemp(dir=folder, prefix=".reserved-")
        files.callback(os.close, descriptor)
        Path(path).unlink()
    except OSError as error:
        return error.errno or errno.EIO
    for start in range(0, size, GIB):
        if time.monotonic() > ends:
            return 0
        if libc.fallocate(descriptor, 0, ctypes.c_long(start), ctypes.c_long(min(GIB, size - start))):
            return ctypes.get_errno()
    return 0


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"
