"""Checkpoints that are whole or absent: written beside, published by rename once every rank has written, read once checked."""

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from conf.errors import Problem, RunError
from conf.files import partial, publish, read_json, write_json, write_text
from conf.schema import Backend, Config
from jobs import failed_write, manifest, retention
from jobs.agreement import OtherRankError, first, together
from jobs.distributed import World
from jobs.retention import folder

Found = tuple[Path, dict[str, Any]]
"""A checkpoint, and what is recorded of it."""


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
    target = folder(config) / f"step-{step:08d}"
    beside = partial(target)
    if together(lambda: world.is_main and _prepare(config, target, expected_bytes))[0]:
        return target
    try:
        parts = together(lambda: _write(beside, write, world.rank))
        files = {name: entry for part in parts for name, entry in part.items()}
        about = {"step": step, "world_size": world.size, **about}
        together(lambda: _publish(target, files, about) if world.is_main else None)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(beside, ignore_errors=True)
        together(lambda: None)  # it is gone: on a full disk there is room for a verdict again
        if isinstance(error, OtherRankError):
            time.sleep(1)  # a verdict quotes the rank that speaks first
        raise
    if world.is_main:
        retention.prune(config, config.train.keep_checkpoints)  # nobody waits for this
    return target


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


def _write(beside: Path, write: Callable[[Path], None], rank: int) -> manifest.Files:
    """This rank's shards on disk, and their entries in the manifest. Raises OSError where they do not get there.

    Anything else that goes wrong is raised at once: ranks may then stand at different collectives, and cannot agree.
    """
    try:
        write(beside)
    except CheckpointException as error:  # a BaseException, raised on all ranks with the failures of each
        if not all(failed_write.is_one(failure) for failure, _ in error.failures.values()):
            raise
        if rank not in error.failures:
            return {}
        raise failed_write.from_system(error.failures[rank][0], beside) from error
    except RuntimeError as error:
        if not failed_write.is_one(error):
            raise
        raise failed_write.from_system(error, beside) from error
    return manifest.written(beside, rank)


def _publish(target: Path, files: manifest.Files, about: dict[str, Any]) -> None:
    beside = partial(target)
    manifest.write(beside, files)
    write_json(beside / "checkpoint.json", about)
    publish(target)
    write_text(target.parent / "latest", target.name + "\n")


def latest(config: Config) -> Found | None:
    """The newest whole checkpoint, by the names and sizes of its files; None in a run that has none. Says what it skips."""
    for path in retention.published(config):
        if not _say(path, manifest.torn(path)):
            return path, read_json(path / "checkpoint.json")
    return None


def newest(config: Config) -> Found | None:
    """The newest checkpoint; None in a run that has none. Raises RunError naming the files where it is not whole."""
    for path in retention.published(config)[:1]:
        if said := manifest.torn(path):
            raise RunError(*(Problem("checkpoint", None, f"{item}: {manifest.REMEDY}") for item in said[:10]))
        return path, read_json(path / "checkpoint.json")
    return None


def find(config: Config, world: World) -> Found | None:
    """The newest whole checkpoint, each of its bytes checked by some rank; None in a run that has none.

    Damaged ones before it are named and set aside. Raises RunError where there are checkpoints, and all are damaged:
    to start over by itself would throw away a run because, say, a disk is not mounted.
    """
    together(lambda: world.is_main and retention.sweep(config))
    damaged: list[Path] = []
    for path in first(lambda: retention.published(config)):
        said = first(lambda path=path: manifest.torn(path))
        if not said:
            parts = together(lambda path=path: manifest.differing(path, world.rank, world.size))
            said = [item for part in parts for item in part]
        if not said:
            together(
                lambda damaged=damaged, path=path: world.is_main and retention.set_aside(config, damaged, good=path)
            )
            return path, first(lambda path=path: read_json(path / "checkpoint.json"))
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
        print(f"checkpoint {path.name} is damaged and skipped: {damage[0]}{more}", flush=True)
    return bool(damage)


def resume(config: Config, world: World, read: Callable[[Path], None], found: Found | None = None) -> int:
    """Load the checkpoint that `find` gave, or gives now, with `read`; returns its step, 0 where there is none.

    FSDP reads what it wrote on any number of ranks and in any of its layouts: shards are found by weight, not by rank.
    Raises RunError when the checkpoint was written in a way that this backend cannot read.
    """
    found = found or find(config, world)
    if found is None:
        return 0
    path, about = found
    fsdp = config.parallel.backend is Backend.fsdp and about["backend"] == Backend.fsdp.name
    if not fsdp and (about["layout"] != config.parallel.name or about["world_size"] != world.size):
        raise RunError(
            Problem(
                "parallel",
                f"{config.parallel.name} on {world.size} ranks",
                f"cannot read {path}, written by {about['layout']} on {about['world_size']} ranks: resume with those",
            )
        )
    read(path)
    if world.is_main:
        same = about["layout"] == config.parallel.name and about["world_size"] == world.size
        print(f"resumed from {path}" + ("" if same else _moved(about, config, world)), flush=True)
    return int(about["step"])


def _moved(about: dict[str, Any], config: Config, world: World) -> str:
    return f", from {about['layout']} on {about['world_size']} ranks to {config.parallel.name} on {world.size}"


def expected_bytes(module: nn.Module) -> int:
    """Of a checkpoint of all ranks: fp32 masters and two moments of each trained parameter, sharded or not."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    return 12 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a weight's values: what training records, and consolidation must find again."""
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
