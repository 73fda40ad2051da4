"""Finds the checkpoints that a program of the user leaves in RUN/checkpoints, whatever it calls them."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from conf.unfinished_checkpoints import why_unfinished

NUMBERED = re.compile(r"(?!tmp)[A-Za-z][A-Za-z_-]*?[-_]?(\d+)")
"""`checkpoint-500`, `step_500`, `global_step500`, `epoch_3`: the folders of the Trainer, Accelerate, DeepSpeed and others."""
CUT_SHORT = ".cut-short"
"""Folder in RUN/checkpoints for the last checkpoint that was cut short."""


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


def newest(folder: Path) -> tuple[int, Path] | None:
    """Return the newest checkpoint that was not cut short; None if there is none."""
    return next((item for item in reversed(numbered(folder)) if not why_unfinished(item[1])), None)


def set_aside(folder: Path) -> Iterator[str]:
    """Move what was cut short since the newest whole checkpoint out of the way of the program. Yields what is to be said.

    A program that takes the newest folder would fail at it at each start. The last one is kept, in case that it is of use.
    """
    for _, path in reversed(numbered(folder)):
        if not (why := why_unfinished(path)):
            return
        kept = folder / CUT_SHORT / path.name
        try:
            shutil.rmtree(kept.parent, ignore_errors=True)
            kept.parent.mkdir()
            path.rename(kept)
            yield f"{path} was cut short ({why}), and is now {kept}: the program continues from the one before"
        except OSError as error:
            yield f"{path} was cut short ({why}), but cannot be moved ({error.strerror}): delete it"
