"""Merges the newest checkpoint that a program of the user has left in RUN/checkpoints."""

import logging
from contextlib import suppress
from pathlib import Path

from conf import program_checkpoints
from conf.choices import Init, OutputDtype, Precision
from conf.errors import Problem, RunError
from conf.precision import recorded
from conf.schema import Config
from conf.unfinished_checkpoints import why_unfinished
from jobs.consolidation import external
from jobs.consolidation.execute import worker_count
from jobs.tensor_io.open_checkpoint import Checkpoint, open_checkpoint

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write RUN/model from the newest checkpoint, or from the one with the number `consolidate.step`.

    Raises RunError if there is none or it cannot be read, DataError if it does not fit the model.
    """
    checkpoint = _weights(_select(config))
    words = [str(checkpoint.folder), "--out", str(Path(config.run_dir) / "model"), "--dtype", _dtype(config)]
    words += ["--shard-gib", str(config.consolidate.shard_gib)]
    words += ["--workers", str(worker_count(config.cluster.cpu.cpus_per_rank))]
    if config.model.init is Init.pretrained:
        words += ["--base", config.model.source]
    else:
        log.info(
            "nothing is compared without the model that the program trains: name it with model=hub model.source=NAME"
        )
    external.merge_checkpoint(external.parser().parse_args(words), checkpoint)


def _dtype(config: Config) -> str:
    """The dtype of the merged weights; for `auto` that of the precision, and bf16 where no rank has settled it."""
    if config.consolidate.dtype is not OutputDtype.auto:
        return config.consolidate.dtype.name
    if config.train.precision is not Precision.auto:
        return config.train.precision.name
    return (recorded(config) or Precision.bf16).name


def _select(config: Config) -> Path:
    folder, step = Path(config.run_dir) / "checkpoints", config.consolidate.step
    checkpoints = program_checkpoints.numbered(folder)
    if step is not None:
        checkpoints = [item for item in checkpoints if item[0] == step]
    if not checkpoints:
        there = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
        which = "no checkpoint" if step is None else f"no checkpoint {step}"
        message = (
            f"has {which}, but {there}. The program must save to the folder $MUSTER_CHECKPOINTS, as NAME-NUMBER; to merge another "
            "folder: python -m jobs.consolidate CHECKPOINT --out FOLDER --base MODEL"
        )
        raise RunError(Problem("checkpoints", folder, message))
    newest = checkpoints[-1][1]
    if step is None and (why := why_unfinished(newest)):
        whole = program_checkpoints.newest(folder)
        instead = f"for the one before, set consolidate.step={whole[0]}" if whole else "there is no other"
        message = f"was cut short: {why}; {instead}. To merge it nevertheless: consolidate.step={checkpoints[-1][0]}"
        raise RunError(Problem("checkpoints", newest, message))
    return newest


def _weights(folder: Path) -> Checkpoint:
    """Open the checkpoint: the folder itself, or the first one inside it that holds weights."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    for candidate in (folder, *inside):
        with suppress(RunError):
            return open_checkpoint(candidate)
    return open_checkpoint(folder)  # raises again, and says what the folder lacks
