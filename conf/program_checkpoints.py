"""Finds the checkpoints that a program of the user leaves in RUN/checkpoints, whatever it calls them."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
from pathlib import Path

NUMBERED = re.compile(r"(?!tmp)[A-Za-z][A-Za-z_-]*?[-_]?(\d+)")
"""`checkpoint-500`, `step_500`, `global_step500`, `epoch_3`: the folders of the Trainer, Accelerate, DeepSpeed and others."""


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """Return (number, folder) of every checkpoint in `folder` or one level below, lowest number first.

    A level below, because Accelerate's `automatic_checkpoint_naming` writes to a folder `checkpoints`.
    """
    found = []
    for path in (*folder.glob("*"), *folder.glob("checkpoints/*")):
        match = NUMBERED.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)
