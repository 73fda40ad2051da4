"""The learning rate of each step: linear warmup, then the shape that `train.lr_schedule` names."""

import math
from collections.abc import Callable

from conf import schedule
from conf.choices import Schedule
from conf.schema import Config
from conf.schema_training import Train

INVERSE_SQRT_STEPS = 10_000
"""Time scale of `inverse_sqrt` without warmup, in steps, as in transformers."""


def learning_rate(step: int, steps: int, config: Config) -> float:
    """The learning rate of step `step` (counted from 0) of `steps`.

    It rises linearly to `train.learning_rate` in the warmup: the first of its W steps has 1/W of the peak, the last has the
    peak. (A Trainer's first step has 0, so its warmup is one step later.) From step W on it equals the schedules of
    transformers, scaled so that they end at `train.min_lr_ratio` of the peak.
    """
    train = config.train
    warmup = 0 if train.lr_schedule is Schedule.constant else schedule.warmup_steps(train, steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    return train.learning_rate * _SHAPES[train.lr_schedule](step, steps, warmup, train)


def _progress(step: int, steps: int, warmup: int) -> float:
    """Share of the steps after the warmup that are done before `step`, from 0 to 1."""
    return min(1.0, (step - warmup) / max(1, steps - warmup))


def _above_floor(share: float, train: Train) -> float:
    """`share` of the way from the floor up to the peak, as a share of the peak."""
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * share


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _constant(step: int, steps: int, warmup: int, train: Train) -> float:
    return 1.0


def _cosine(step: int, steps: int, warmup: int, train: Train) -> float:
    return _above_floor(_half_cosine(_progress(step, steps, warmup)), train)


def _cosine_restarts(step: int, steps: int, warmup: int, train: Train) -> float:
    progress = _progress(step, steps, warmup)
    return _above_floor(_half_cosine(train.lr_cycles * progress % 1.0) if progress < 1 else 0.0, train)


def _polynomial(step: int, steps: int, warmup: int, train: Train) -> float:
    return _above_floor((1 - _progress(step, steps, warmup)) ** train.lr_power, train)


def _linear(step: int, steps: int, warmup: int, train: Train) -> float:
    return _above_floor(1 - _progress(step, steps, warmup), train)


def _inverse_sqrt(step: int, steps: int, warmup: int, train: Train) -> float:
    """1/sqrt(step), shifted so that it is 1 at the end of the warmup; never below the floor."""
    scale = warmup or INVERSE_SQRT_STEPS
    return max(train.min_lr_ratio, math.sqrt(scale / (step - warmup + scale)))


def _warmup_stable_decay(step: int, steps: int, warmup: int, train: Train) -> float:
    """The peak, then half a cosine over the last `train.decay_ratio` of all steps (Hu 2024, arXiv 2404.06395)."""
    decay = min(steps - warmup, round(train.decay_ratio * steps))
    return _above_floor(_half_cosine(_progress(step, steps, steps - decay)) if step >= steps - decay else 1.0, train)


_SHAPES: dict[Schedule, Callable[[int, int, int, Train], float]] = {
    Schedule.cosine: _cosine,
    Schedule.cosine_restarts: _cosine_restarts,
    Schedule.linear: _linear,
    Schedule.polynomial: _polynomial,
    Schedule.constant: _constant,
    Schedule.constant_with_warmup: _constant,
    Schedule.inverse_sqrt: _inverse_sqrt,
    Schedule.wsd: _warmup_stable_decay,
}
"""Share of the peak at (step, steps, steps of warmup, the section train), for steps after the warmup."""
