"""Deletes old checkpoints: keeps the newest complete ones and the milestones, and frees space for the next one."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from conf import held_out
from conf.errors import Problem, RunError
from conf.files import sync, write_text
from conf.schema import Config
from jobs.checkpoint import manifest
from jobs.checkpoint.paths import checkpoints_folder, published_checkpoints, step_of


def delete_leftovers(config: Config) -> None:
    """Delete what a killed attempt left half written or half deleted. Do not call it while a checkpoint is being written."""
    for kind in ("partial", "old"):
        for path in checkpoints_folder(config).glob(f".step-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(config: Config, damaged: list[Path], good: Path | None) -> None:
    """Rename damaged checkpoints, so that nothing reads them, and let `latest` name the good one. `prune` deletes them later."""
    for path in damaged:
        hidden = path.with_name(f".{path.name}.damaged")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
    if damaged:
        sync(checkpoints_folder(config))
    if damaged and good:
        write_text(checkpoints_folder(config) / "latest", good.name + "\n")


def prune(config: Config, keep: int) -> None:
    """Delete checkpoints, except the `keep` newest complete ones, the steps that are multiples of train.keep_every, and the one
    with the lowest held-out loss if that is kept.

    Only complete checkpoints count, so the last good one always stays.
    """
    every = config.train.keep_every
    complete = [path for path in published_checkpoints(config) if not manifest.size_problems(path)]
    if not complete:
        return
    kept = {*complete[:keep], *(path for path in complete if every and step_of(path) % every == 0)}
    if held_out.keeps_best(config) and (best := best_of(config, complete)):
        kept.add(best)
    newest = step_of(complete[0])
    for path in published_checkpoints(config):
        if path not in kept and step_of(path) < newest:
            _delete(path)
    for path in checkpoints_folder(config).glob(".step-*.damaged"):
        if step_of(path) <= newest:
            shutil.rmtree(path, ignore_errors=True)


def best_of(config: Config, checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest held-out loss in RUN/metrics.jsonl; None if none of them was evaluated."""
    losses: dict[int, float] = {}
    metrics = Path(config.run_dir) / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        with suppress(ValueError, KeyError, TypeError):  # a torn last line, or a line of a training step
            values = json.loads(line)
            losses[int(values["step"])] = float(values["eval_loss"])
    evaluated = [path for path in checkpoints if step_of(path) in losses]
    return min(evaluated, key=lambda path: (losses[step_of(path)], step_of(path)), default=None)


def _delete(path: Path) -> None:
    """Rename it to a hidden name first, so that a half deleted checkpoint is never taken for a complete one."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def make_room(config: Config, expected_bytes: int) -> None:
    """Make sure that the disk has space for another checkpoint, of the newest one's size, or of `expected_bytes` if there is none.

    If it does not fit, the oldest checkpoint is deleted now instead of after the save; one complete checkpoint always stays.
    Raises RunError if there is still too little free space. A quota cannot be seen here: it shows only when a write fails.
    """
    checkpoints = checkpoints_folder(config)
    checkpoints.mkdir(parents=True, exist_ok=True)
    newest = next((path for path in published_checkpoints(config) if not manifest.size_problems(path)), None)
    needed = manifest.size(newest) if newest else expected_bytes
    if shutil.disk_usage(checkpoints).free >= needed:
        return
    prune(config, max(1, config.train.keep_checkpoints - 1))
    if (free := shutil.disk_usage(checkpoints).free) < needed:
        message = (
            f"the next checkpoint needs {needed / 2**30:.3g} GiB, only {free / 2**30:.3g} GiB are free: free space on this disk, "
            "lower train.keep_checkpoints, or raise train.keep_every; then resume"
        )
        raise RunError(Problem("checkpoints", checkpoints, message))
