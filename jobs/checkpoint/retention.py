"""Which checkpoints of a run stay: the newest whole ones, the milestones, and what must go before another one fits."""

import os
import shutil
from pathlib import Path

from conf.errors import Problem, RunError
from conf.files import sync, write_text
from conf.schema import Config
from jobs.checkpoint import manifest
from jobs.checkpoint.paths import folder, published, step_of


def sweep(config: Config) -> None:
    """Delete what a killed attempt left half written or half deleted. Nothing may be saving meanwhile."""
    for kind in ("partial", "old"):
        for path in folder(config).glob(f".step-*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(config: Config, damaged: list[Path], good: Path | None) -> None:
    """Hide damaged checkpoints from all readers until training has passed them, and let `latest` name the good one."""
    for path in damaged:
        hidden = path.with_name(f".{path.name}.damaged")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
    if damaged:
        sync(folder(config))
    if damaged and good:
        write_text(folder(config) / "latest", good.name + "\n")


def prune(config: Config, keep: int) -> None:
    """Keep the `keep` newest that are whole, and those at multiples of train.keep_every; so the only good one always stays."""
    every = config.train.keep_every
    whole = [path for path in published(config) if not manifest.torn(path)]
    if not whole:
        return
    stay = {*whole[:keep], *(path for path in whole if every and step_of(path) % every == 0)}
    for path in published(config):
        if path not in stay and step_of(path) < step_of(whole[0]):
            _delete(path)
    for path in folder(config).glob(".step-*.damaged"):
        if step_of(path) <= step_of(whole[0]):
            shutil.rmtree(path, ignore_errors=True)


def _delete(path: Path) -> None:
    """A name that starts with a dot first, so that a half deleted one is never taken for whole."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def make_room(config: Config, expected_bytes: int) -> None:
    """See that another checkpoint fits on the disk: as large as the newest, or as `expected_bytes` where there is none.

    What another checkpoint would push out goes now if need be, but one whole one stays whatever happens to the next.
    Raises RunError where there is too little room even so. A quota shows only when the write fails.
    """
    home = folder(config)
    home.mkdir(parents=True, exist_ok=True)
    whole = next((path for path in published(config) if not manifest.torn(path)), None)
    needed = manifest.size(whole) if whole else expected_bytes
    if shutil.disk_usage(home).free >= needed:
        return
    prune(config, max(1, config.train.keep_checkpoints - 1))
    if (free := shutil.disk_usage(home).free) < needed:
        said = (
            f"the next one needs {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free: free space on this disk, "
            "lower train.keep_checkpoints, or raise train.keep_every; then resume"
        )
        raise RunError(Problem("checkpoints", home, said))
