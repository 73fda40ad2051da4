"""Saves and resumes checkpoints so that each is either complete or absent.

Ranks write into a hidden folder. Rank 0 renames it once every rank has written its shards. Before a resume, checksums are compared.
"""

import functools
import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from conf.bytes_per_weight import MOMENT_BYTES
from conf.choices import Backend, Precision
from conf.errors import Problem, RunError
from conf.files import partial, publish, read_json, write_json, write_text
from conf.held_out import BEST
from conf.schema import Config
from jobs.checkpoint import manifest, paths, retention, write_errors
from jobs.checkpoint.paths import checkpoints_folder
from jobs.distributed.collectives import OtherRankError, barrier, broadcast_from_rank0, gather
from jobs.distributed.process_group import World

log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A published checkpoint."""

    path: Path
    info: dict[str, Any]
    """The content of its checkpoint.json: step, world size, layout, ..."""


class RankFiles(NamedTuple):
    """What one rank wrote of a checkpoint."""

    files: manifest.Files
    seconds: float
    """Time it took, with flushing and checksums."""


@dataclass(frozen=True)
class Written:
    """What all ranks wrote."""

    bytes: int
    seconds: float
    """Time of the slowest rank."""


def step_folder(config: Config, step: int) -> Path:
    """RUN/checkpoints/step-00000100 for step 100."""
    return checkpoints_folder(config) / f"step-{step:08d}"


def begin(config: Config, step: int, world: World, expected_bytes: int = 0) -> Path | None:
    """Return the empty hidden folder into which all ranks write the checkpoint of `step`. All ranks call this together.

    Returns None if a complete checkpoint of `step` is already there. `expected_bytes` is the size of all ranks' shards: the first
    checkpoint has no earlier one whose size could tell whether it fits. Raises RunError if the disk has too little free space.
    """
    target = step_folder(config, step)
    is_complete = gather(lambda: world.is_main and _prepare(config, target, expected_bytes))[0]
    return None if is_complete else partial(target)


def finish(config: Config, step: int, world: World, work: Callable[[], RankFiles], info: dict[str, Any]) -> Written:
    """Call `work`, which writes this rank's shards (or waits until a thread has), then publish the checkpoint of `step`.

    All ranks call this together. An OSError of `work` is raised on the rank where it happened; the others raise OtherRankError.
    Then nothing of this checkpoint is left, and the earlier ones are untouched.
    """
    target = step_folder(config, step)
    try:
        ranks = gather(work)
        files = {name: entry for rank in ranks for name, entry in rank.files.items()}
        info = {"step": step, "world_size": world.size, **info}
        gather(lambda: _publish(target, files, info) if world.is_main else None)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(partial(target), ignore_errors=True)
        # Ranks write their verdict only after rank 0 has deleted the folder: until then a full disk has no space for one
        barrier()
        if isinstance(error, OtherRankError):
            # The verdict of the attempt quotes the first rank that fails. The rank with the real error should be that one.
            time.sleep(1)
        raise
    if world.is_main:
        retention.prune(config, config.train.keep_checkpoints)  # the other ranks do not wait for this
    return Written(sum(int(entry["bytes"]) for entry in files.values()), max(rank.seconds for rank in ranks))


def _prepare(config: Config, target: Path, expected_bytes: int) -> bool:
    """Make the empty hidden folder for `target`. Returns True, and makes none, if `target` is already there and complete."""
    if target.exists():
        if not manifest.size_problems(target):
            return True
        retention.set_aside(config, [target], None)
    retention.delete_leftovers(config)
    retention.make_room(config, expected_bytes)
    partial(target).mkdir(parents=True)
    return False


def write_shards(hidden: Path, write: Callable[[], object], rank: int) -> RankFiles:
    """Call `write`, which writes this rank's shards into `hidden`; flush them and compute their checksums.

    Raises OSError if they cannot be written, so that all ranks can agree that this checkpoint failed. Any other error is raised
    unchanged: after it the ranks may be in different collectives, and cannot agree on anything.
    """
    # takes 0.5 s to import, and consolidation does not need it
    from torch.distributed.checkpoint import CheckpointException

    began = time.perf_counter()
    try:
        write()
    except CheckpointException as error:  # a BaseException; raised on all ranks, with the failures of each rank
        if not all(write_errors.is_write_error(failure) for failure, _ in error.failures.values()):
            raise
        if rank not in error.failures:
            return RankFiles({}, 0.0)
        raise write_errors.to_os_error(error.failures[rank][0], hidden) from error
    except RuntimeError as error:
        if not write_errors.is_write_error(error):
            raise
        raise write_errors.to_os_error(error, hidden) from error
    return RankFiles(manifest.flush_and_describe(hidden, rank), time.perf_counter() - began)


def _publish(target: Path, files: manifest.Files, info: dict[str, Any]) -> None:
    hidden = partial(target)
    manifest.write(hidden, files)
    write_json(hidden / "checkpoint.json", info)
    publish(target)
    write_text(target.parent / "latest", target.name + "\n")


def select_for_consolidation(config: Config) -> Checkpoint | None:
    """The checkpoint of `consolidate.step`, or the newest one if that is null; None if the run has no checkpoint.

    Raises RunError with the steps there are if `consolidate.step` is none of them, if it is `best` and no checkpoint was evaluated,
    and with the bad files if files are missing or too short.
    """
    step, candidates = config.consolidate.step, paths.published_checkpoints(config)
    if step == BEST and candidates:
        best = retention.best_of(config, candidates)
        if best is None:
            message = "no checkpoint of this run has a held-out loss: take one by its step, or consolidate.step=null"
            raise RunError(Problem("consolidate.step", step, message))
        candidates = [best]
    elif step is not None:
        steps = [paths.step_of(path) for path in candidates]
        candidates = [path for path in candidates if paths.step_of(path) == step]
        if steps and not candidates:
            message = f"is no checkpoint of this run: take one of {', '.join(map(str, sorted(steps)))}"
            raise RunError(Problem("consolidate.step", step, message))
    if not candidates:
        return None
    path = candidates[0]
    if problems := manifest.size_problems(path):
        raise RunError(*(Problem("checkpoint", None, f"{problem}: {manifest.REMEDY}") for problem in problems[:10]))
    return Checkpoint(path, read_json(path / "checkpoint.json"))


def find_newest(config: Config, world: World) -> Checkpoint | None:
    """The newest checkpoint with correct checksums; None if the run has no checkpoint. All ranks call this together.

    The ranks share the reading. Newer checkpoints that are damaged are logged and renamed, so that nothing reads them. Raises
    RunError if all checkpoints are damaged: a run must not start from step 0 because, for example, a disk is not mounted.
    """
    gather(lambda: retention.delete_leftovers(config) if world.is_main else None)
    damaged: list[Path] = []
    for path in broadcast_from_rank0(lambda: paths.published_checkpoints(config)):
        problems = broadcast_from_rank0(functools.partial(manifest.size_problems, path))
        if not problems:
            problems_by_rank = gather(functools.partial(manifest.checksum_problems, path, world.rank, world.size))
            problems = [problem for rank_problems in problems_by_rank for problem in rank_problems]
        if not problems:
            gather(functools.partial(_set_aside, config, world, damaged, path))
            return Checkpoint(path, broadcast_from_rank0(functools.partial(read_json, path / "checkpoint.json")))
        damaged.append(path)
        if world.is_main:
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            log.warning(f"checkpoint {path.name} is damaged and skipped: {problems[0]}{more}")
    if damaged:
        message = f"all {len(damaged)} checkpoints are damaged: restore their files, or move this folder away to start from step 0"
        raise RunError(Problem("checkpoints", checkpoints_folder(config), message))
    return None


def _set_aside(config: Config, world: World, damaged: list[Path], good: Path) -> None:
    if world.is_main:
        retention.set_aside(config, damaged, good=good)


def resume(
    config: Config,
    world: World,
    read: Callable[[Path], None],
    checkpoint: Checkpoint | None = None,
    reshard: Callable[[Path, Backend], object] | None = None,
) -> int:
    """Load `checkpoint`, or what `find_newest` returns now; returns its step, or 0 if there is none.

    `read` is the backend's own function. It loads a checkpoint of the same layout and ranks, and FSDP's loads any checkpoint that
    FSDP wrote. `reshard` loads every other one; it also gets the backend that wrote it.
    """
    checkpoint = checkpoint or find_newest(config, world)
    if checkpoint is None:
        return 0
    path, info = checkpoint
    written_by, same_layout = Backend[info["backend"]], _same_layout(info, config, world)
    both_fsdp, began = written_by is config.parallel.backend is Backend.fsdp, time.perf_counter()
    if both_fsdp or same_layout or reshard is None:
        read(path)
    else:
        reshard(path, written_by)
    if world.is_main:
        size, seconds = sum(file.stat().st_size for file in path.rglob("*")), time.perf_counter() - began
        took = f"{size / 1e9:.3g} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)"
        log.info(f"resumed from {path}, {took}" + ("" if same_layout else _layout_change(info, config, world)))
    return int(info["step"])


def layout(config: Config, world: World) -> dict[str, Any]:
    """The entries of checkpoint.json that say how the state is sharded."""
    parallel = {name: getattr(value, "name", value) for name, value in vars(config.parallel).items()}
    return {"layout": parallel["name"], "backend": parallel["backend"], "parallel": parallel, "world_size": world.size}


def _same_layout(info: dict[str, Any], config: Config, world: World) -> bool:
    """Whether the shards match this run's. Old checkpoints do not record `parallel`; for them the layout's name decides."""
    current = layout(config, world)
    return all(info[key] == current[key] for key in ("layout", "parallel", "world_size") if key in info)


def _layout_change(info: dict[str, Any], config: Config, world: World) -> str:
    return f", from {info['layout']} on {info['world_size']} ranks to {config.parallel.name} on {world.size}"


def expected_bytes(module: nn.Module, config: Config) -> int:
    """Size of a checkpoint (all ranks): fp32 weight and optimizer state of each trained parameter, with AdamW 12 bytes an element.

    Stages 1 and 2 of ZeRO also write the trained weights in the precision of training. DeepSpeed parameters count with their
    whole size, also when they are partitioned.
    """
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    count = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trained)
    has_copy = config.parallel.backend is Backend.zero and config.parallel.zero_stage < 3
    copy_bytes = (4 if config.train.precision is Precision.fp32 else 2) if has_copy else 0
    return int(count * (4 + MOMENT_BYTES[config.train.optimizer] + copy_bytes))


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a weight's values. Training records it, and consolidation compares its result with it."""
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
