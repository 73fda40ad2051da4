"""The learning rate of a step: linear warmup, then the schedule's decay."""

import math

from conf.schema import Config


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Of the step that leads from `step` to `step` + 1: linear warmup to the peak, then a cosine to `min_lr_ratio` of it."""
    peak, warmup = config.train.learning_rate, min(config.train.warmup_steps, steps - 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (config.train.min_lr_ratio + (1 - config.train.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)
