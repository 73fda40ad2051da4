"""Starts the experiment tracker that `tracker` names: TensorBoard or Weights & Biases (wandb), through accelerate.

A resumed run continues the curves of its earlier attempts.
"""

import uuid
from pathlib import Path
from typing import Any

from conf.choices import Tracker
from conf.files import read_json, write_json
from conf.schema import Config


def start_tracker(config: Config, first_step: int) -> Any:
    """Start the tracker and return accelerate's `GeneralTracker`; None if `tracker` is `none`. Only rank 0 calls it.

    `first_step` is the step of the checkpoint that training resumes from, 0 for a new run. Raises ImportError if the
    package of the tracker is not installed.
    """
    if config.tracker is Tracker.none:
        return None
    from accelerate.tracking import (  # type: ignore[import-untyped] # imports tensorboard and wandb
        TensorBoardTracker,
        WandBTracker,
    )

    if config.tracker is Tracker.tensorboard:
        purge_step = first_step + 1 if first_step else None  # hides what a killed attempt wrote after its checkpoint
        tracker = TensorBoardTracker(config.name, logging_dir=config.run_dir, purge_step=purge_step)
    else:
        name = Path(config.run_dir).name
        tracker = WandBTracker(config.name, id=_wandb_run_id(config), name=name, resume="allow", dir=config.run_dir)
    tracker.start()
    return tracker


def _wandb_run_id(config: Config) -> str:
    """A random W&B run id, the same for all attempts of a run. It is kept in RUN/tracker.json.

    The name of the run folder cannot be the id: runs of other projects may have the same name.
    """
    path = Path(config.run_dir) / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    return str(read_json(path)["id"])
