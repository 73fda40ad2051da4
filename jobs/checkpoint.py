"""Checkpoints that are whole or absent: written beside, published by rename once every rank has written, then pruned."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import Problem, RunError
from conf.files import partial, publish, read_json, sync_tree, write_json, write_text
from conf.schema import Backend, Config
from jobs.distributed import World


def folder(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def save(config: Config, step: int, world: World, write: Callable[[Path], None], about: dict[str, Any]) -> Path:
    """Publish the checkpoint of `step`: `write` puts this rank's shards into a folder. All ranks call this together."""
    target = folder(config) / f"step-{step:08d}"
    beside = partial(target)
    if _agreed(target.exists(), world):
        return target
    if world.is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    write(beside)
    if world.local_rank == 0:
        sync_tree(beside)  # every node flushes what its ranks wrote
    dist.barrier()
    if world.is_main:
        write_json(beside / "checkpoint.json", {"step": step, "world_size": world.size, **about})
        publish(target)
        write_text(folder(config) / "latest", target.name + "\n")
    dist.barrier()
    if world.is_main:
        _prune(config)  # nobody waits for this
    return target


def latest(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and what is recorded of it; None in a run that has none."""
    found = [
        path
        for path in folder(config).glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and (path / "checkpoint.json").exists()
    ]
    if not found:
        return None
    newest = max(found, key=lambda path: int(path.name.removeprefix("step-")))
    return newest, read_json(newest / "checkpoint.json")


def resume(config: Config, world: World, read: Callable[[Path], None]) -> int:
    """Load the newest whole checkpoint with `read`; returns its step, 0 where there is none.

    FSDP reads what it wrote on any number of ranks and in any of its layouts: shards are found by weight, not by rank.
    Raises RunError when the checkpoint was written in a way that this backend cannot read.
    """
    found = _agreed(latest(config), world)
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


def fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of a weight's values: what training records, and consolidation must find again."""
    return hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()


def _agreed(value: Any, world: World) -> Any:
    """What rank 0 sees: on a shared file system another node may still see the folder as it was a minute ago."""
    box = [value if world.is_main else None]
    dist.broadcast_object_list(box)
    return box[0]


def _prune(config: Config) -> None:
    """Delete all but the newest; a name that starts with a dot first, so that a half deleted one is never taken for whole."""
    kept = sorted(folder(config).glob("step-*"))
    for path in kept[: -config.train.keep_checkpoints]:
        hidden = path.with_name(f".{path.name}.old")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
