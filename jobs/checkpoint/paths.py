"""Where checkpoints lie in a run folder, and which of them are complete."""

import re
from pathlib import Path

from conf.schema import Config


def folder(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def published(config: Config) -> list[Path]:
    """Every checkpoint by its name, whole or not, newest first."""
    found = [path for path in folder(config).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Of `step-00000100`, and of a hidden `.step-00000100.damaged`."""
    return int(path.name.removeprefix(".").removeprefix("step-").split(".")[0])
