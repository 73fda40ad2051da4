"""The learning rate schedule: linear warmup, then cosine decay."""

import math

from conf.schema import Config


def learning_rate(step: int, steps: int, config: Config) -> float:
    """The learning rate of step `step` (counted from 0) of `steps`.

    It rises linearly to `train.learning_rate` over `train.warmup_steps` (at most `steps` - 1), then follows half a cosine down
    to `train.min_lr_ratio` of it.
    """
    peak, warmup = config.train.learning_rate, min(config.train.warmup_steps, steps - 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (config.train.min_lr_ratio + (1 - config.train.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)
