"""Saves a checkpoint from a test, in one call and without a thread."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.checkpoint import checkpointing
from jobs.distributed.process_group import World


def save(
    config: Config,
    step: int,
    world: World,
    write: Callable[[Path], object],
    info: dict[str, Any],
    expected_bytes: int = 0,
) -> Path:
    """Publish the checkpoint of `step`: `write` puts this rank's shards into a folder. All ranks call this together."""
    if hidden := checkpointing.begin(config, step, world, expected_bytes):
        work = lambda: checkpointing.write_shards(hidden, lambda: write(hidden), world.rank)  # noqa: E731
        checkpointing.finish(config, step, world, work, info)
    return checkpointing.step_folder(config, step)
