"""Paths of checkpoints in a run folder."""

import re
from pathlib import Path

from conf.schema import Config


def checkpoints_folder(config: Config) -> Path:
    """RUN/checkpoints."""
    return Path(config.run_dir) / "checkpoints"


def published_checkpoints(config: Config) -> list[Path]:
    """Every folder with the name of a checkpoint, newest first. It may be damaged; nothing in it is read."""
    checkpoints = [path for path in checkpoints_folder(config).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(checkpoints, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a name like `step-00000100`, or a hidden one like `.step-00000100.damaged`."""
    return int(path.name.removeprefix(".").removeprefix("step-").split(".")[0])
