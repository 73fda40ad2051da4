"""Checkpoints that are whole or absent: written beside, published by rename once every rank has written, read once checked."""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.choices import Backend
from conf.errors import Problem, RunError
from conf.files import partial, publish, read_json, write_json, write_text
from conf.schema import Config
from jobs.checkpoint import manifest, paths, retention, write_errors
from jobs.checkpoint.paths import folder
from jobs.distributed.collectives import OtherRankError, barrier, broadcast_from_rank0, gather
from jobs.distributed.process_group import World

log = logging.getLogger(__name__)

Found = tuple[Path, dict[str, Any]]
"""A checkpoint, and what is recorded of it."""


Part = tuple[manifest.Files, float]
"""What one rank wrote, and the seconds that it took."""


@dataclass(frozen=True)
class Written:
    """What all ranks wrote, and the seconds of the slowest."""

    bytes: int
    seconds: float


def place(config: Config, step: int) -> Path:
    return folder(config) / f"step-{step:08d}"


def save(
    config: Config,
    step: int,
    world: World,
    write: Callable[[Path], None],
    about: dict[str, Any],
    expected_bytes: int = 0,
) -> Path:
    """Publish the checkpoint of `step`: `write` puts this rank's shards into a folder. All ranks call this together.

    `expected_bytes`: of all ranks' shards, so that the first checkpoint, too, is only begun where it fits.
    Raises RunError where the disk has too little room. What fails while writing (OSError) is raised on the rank it fails
    on, and told to the others; then nothing is left of this checkpoint, and those before it stay.
    """
    if beside := begin(config, step, world, expected_bytes):
        finish(config, step, world, lambda: written(beside, lambda: write(beside), world.rank), about)
    return place(config, step)


def begin(config: Config, step: int, world: World, expected_bytes: int = 0) -> Path | None:
    """The empty folder that the checkpoint of `step` is to be written into; None where that checkpoint is there, and whole."""
    target = place(config, step)
    there = gather(lambda: world.is_main and _prepare(config, target, expected_bytes))[0]
    return None if there else partial(target)


def finish(config: Config, step: int, world: World, work: Callable[[], Part], about: dict[str, Any]) -> Written:
    """Publish what `work` has written, or writes now, once it has on all ranks; or else leave nothing of it. Raises as `save`."""
    target = place(config, step)
    try:
        parts = gather(work)
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        about = {"step": step, "world_size": world.size, **about}
        gather(lambda: _publish(target, files, about) if world.is_main else None)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(partial(target), ignore_errors=True)
        barrier()  # it is gone: on a full disk there is room for a verdict again
        if isinstance(error, OtherRankError):
            time.sleep(1)  # a verdict quotes the rank that speaks first
        raise
    if world.is_main:
        retention.prune(config, config.train.keep_checkpoints)  # nobody waits for this
    return Written(sum(int(entry["bytes"]) for entry in files.values()), max(seconds for _, seconds in parts))


def _prepare(config: Config, target: Path, expected_bytes: int) -> bool:
    """Make the empty folder beside `target`; True where `target` is there, and whole."""
    if target.exists():
        if not manifest.torn(target):
            return True
        retention.set_aside(config, [target], None)
    retention.sweep(config)
    retention.make_room(config, expected_bytes)
    partial(target).mkdir(parents=True)
    return False


def written(beside: Path, write: Callable[[], None], rank: int) -> Part:
    """Write this rank's shards, to the disk; their entries in the manifest. Raises OSError where they do not get there.

    Anything else that goes wrong is raised at once: ranks may then stand at different collectives, and cannot agree.
    """
    from torch.distributed.checkpoint import CheckpointException  # half a second that a merge does not need

    began = time.perf_counter()
    try:
        write()
    except CheckpointException as error:  # a BaseException, raised on all ranks with the failures of each
        if not all(write_errors.is_one(failure) for failure, _ in error.failures.values()):
            raise
        if rank not in error.failures:
            return {}, 0.0
        raise write_errors.from_system(error.failures[rank][0], beside) from error
    except RuntimeError as error:
        if not write_errors.is_one(error):
            raise
        raise write_errors.from_system(error, beside) from error
    return manifest.written(beside, rank), time.perf_counter() - began


def _publish(target: Path, files: manifest.Files, about: dict[str, Any]) -> None:
    beside = partial(target)
    manifest.write(beside, files)
    write_json(beside / "checkpoint.json", about)
    publish(target)
    write_text(target.parent / "latest", target.name + "\n")


def latest(config: Config) -> Found | None:
    """The newest whole checkpoint, by the names and sizes of its files; None in a run that has none. Says what it skips."""
    for path in paths.published(config):
        if not _say(path, manifest.torn(path)):
            return path, read_json(path / "checkpoint.json")
    return None


def to_merge(config: Config) -> Found | None:
    """The checkpoint that `consolidate.step` names, or the newest; None in a run that has none.

    Raises RunError naming those that there are where it is not one of them, and its files where it is not whole.
    """
    asked, every = config.consolidate.step, paths.published(config)
    if asked is not None:
        steps = [paths.step_of(path) for path in every]
        every = [path for path in every if paths.step_of(path) == asked]
        if steps and not every:
            said = f"is no checkpoint of this run: take one of {', '.join(map(str, sorted(steps)))}"
            raise RunError(Problem("consolidate.step", asked, said))
    for path in every[:1]:
        if said := manifest.torn(path):
            raise RunError(*(Problem("checkpoint", None, f"{item}: {manifest.REMEDY}") for item in said[:10]))
        return path, read_json(path / "checkpoint.json")
    return None


def find(config: Config, world: World) -> Found | None:
    """The newest whole checkpoint, each of its bytes checked by some rank; None in a run that has none.

    Damaged ones before it are named and set aside. Raises RunError where there are checkpoints, and all are damaged:
    to start over by itself would throw away a run because, say, a disk is not mounted.
    """
    gather(lambda: world.is_main and retention.sweep(config))
    damaged: list[Path] = []
    for path in broadcast_from_rank0(lambda: paths.published(config)):
        said = broadcast_from_rank0(lambda path=path: manifest.torn(path))
        if not said:
            parts = gather(lambda path=path: manifest.differing(path, world.rank, world.size))
            said = [item for part in parts for item in part]
        if not said:
            gather(lambda damaged=damaged, path=path: world.is_main and retention.set_aside(config, damaged, good=path))
            return path, broadcast_from_rank0(lambda path=path: read_json(path / "checkpoint.json"))
        damaged.append(path)
        if world.is_main:
            _say(path, said)
    if damaged:
        said = f"none of {len(damaged)} checkpoints is whole: bring their files back, or move the folder away to start anew"
        raise RunError(Problem("checkpoints", folder(config), said))
    return None


def _say(path: Path, damage: list[str]) -> bool:
    """One line for a checkpoint that is skipped; False where there is nothing to say."""
    if damage:
        more = f", and {len(damage) - 1} more" if len(damage) > 1 else ""
        log.info(f"checkpoint {path.name} is damaged and skipped: {damage[0]}{more}")
    return bool(damage)


def resume(
    config: Config,
    world: World,
    read: Callable[[Path], None],
    found: Found | None = None,
    move: Callable[[Path, Backend], object] | None = None,
) -> int:
    """Load the checkpoint that `find` gave, or gives now; returns its step, 0 where there is none.

    The backend's own `read` loads what its own layout wrote; FSDP's does so for any number of ranks and all of its layouts.
    `move` is for what any other layout wrote, named by its backend.
    """
    found = found or find(config, world)
    if found is None:
        return 0
    path, about = found
    wrote, same = Backend[about["backend"]], _as_before(about, config, world)
    fsdp, began = wrote is config.parallel.backend is Backend.fsdp, time.perf_counter()
    if fsdp or same or move is None:
        read(path)
    else:
        move(path, wrote)
    if world.is_main:
        size, seconds = sum(file.stat().st_size for file in path.rglob("*")), time.perf_counter() - began
        took = f"{size / 1e9:.3g} GB in {seconds:.1f} s ({size / 1e9 / seconds:.2f} GB/s)"
        log.info(f"resumed from {path}, {took}" + ("" if same else _moved(about, config, world)))
    return int(about["step"])


def layout(config: Config, world: World) -> dict[str, Any]:
    """What is recorded of how a checkpoint is cut into shards."""
    parallel = {name: getattr(value, "name", value) for name, value in vars(config.parallel).items()}
    return {"layout": parallel["name"], "backend": parallel["backend"], "parallel": parallel, "world_size": world.size}


def _as_before(about: dict[str, Any], config: Config, world: World) -> bool:
    """Whether shards are cut as they were; checkpoints from before `parallel` was recorded go by the layout's name."""
    now = layout(config, world)
    return all(about[key] == now[key] for key in ("layout", "parallel", "world_size") if key in about)


def _moved(about: dict[str, Any], config: Config, world: World) -> str:
    return f", from {about['layout']} on {about['world_size']} ranks to {config.parallel.name} on {world.size}"


def expected_bytes(module: nn.Module) -> int:
    """Of a checkpoint of all ranks: fp32 masters and two moments of each trained parameter, sharded or not."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return 12 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a weight's values: what training records, and consolidation must find again."""
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
