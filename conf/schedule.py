"""Steps of the warmup, and the steps at which training evaluates and saves: arithmetic on which the launcher and jobs agree."""

import math
from dataclasses import dataclass
from fractions import Fraction

from conf.schema_training import Train

WARMUP_STEPS = 10
"""Steps of warmup if neither `train.warmup_steps` nor `train.warmup_ratio` is set, but at most a tenth of the training."""
EVAL_EVERY = 100
SAVE_EVERY = 500


def steps(train: Train, rows: int) -> int:
    """Steps of the whole training. `rows` are the training rows of one epoch."""
    return train.steps or max(1, math.ceil((train.epochs or 1) * rows / train.global_batch))


def warmup_steps(train: Train, steps: int) -> int:
    """Steps of linear warmup in a training of `steps` steps; at least one step follows them."""
    if train.warmup_steps is not None:
        wanted = train.warmup_steps
    elif train.warmup_ratio is not None:
        wanted = round(train.warmup_ratio * steps)
    else:
        wanted = min(WARMUP_STEPS, steps // 10)
    return min(wanted, steps - 1)


@dataclass(frozen=True)
class Interval:
    """When something is due that happens every `steps` steps. A fraction, because an epoch need not be whole steps."""

    steps: Fraction
    """0: never."""

    def is_due(self, step: int) -> bool:
        """Whether it is due after step number `step`, counted from 1. Step 0, before training, is never due."""
        return step > 0 < self.steps and step // self.steps > (step - 1) // self.steps


def evaluations(train: Train, rows: int) -> Interval:
    """When to evaluate. `rows` are the training rows of one epoch."""
    return _interval(train.eval_every, train.evals_per_epoch, EVAL_EVERY, rows, train.global_batch)


def saves(train: Train, rows: int) -> Interval:
    """When to save a checkpoint. `rows` are the training rows of one epoch."""
    return _interval(train.save_every, train.saves_per_epoch, SAVE_EVERY, rows, train.global_batch)


def _interval(every: int | None, per_epoch: int | None, default: int, rows: int, global_batch: int) -> Interval:
    if every is None and per_epoch is not None:
        return Interval(Fraction(rows, global_batch * per_epoch))
    return Interval(Fraction(default if every is None else every))
