"""Decides when the held-out loss has stopped falling, as transformers' EarlyStoppingCallback does."""

import math
from collections.abc import Mapping

from conf.schema_training import EarlyStopping


class HeldOutLosses:
    """The held-out losses of a training so far, by step. All ranks hold the same."""

    def __init__(self, settings: EarlyStopping, earlier: Mapping[int, float]) -> None:
        """`earlier` are those of the attempts before. The evaluation before step 1 does not count."""
        self.settings = settings
        self.losses = {step: earlier[step] for step in sorted(earlier) if step > 0}

    def add(self, step: int, loss: float) -> None:
        if step > 0:
            self.losses[step] = loss

    def is_best(self, step: int) -> bool:
        """Whether the loss of `step` is below all before it."""
        return step in self.losses and all(
            self.losses[step] < loss for other, loss in self.losses.items() if other < step
        )

    def best_step(self) -> int | None:
        return min(self.losses, key=lambda step: (self.losses[step], step), default=None)

    @property
    def is_over(self) -> bool:
        """Whether `train.early_stopping.patience` evaluations in a row have not improved the best loss by more than `min_delta`."""
        if self.settings.patience is None:
            return False
        best, without_progress = math.inf, 0
        for loss in self.losses.values():
            without_progress = 0 if loss < best - self.settings.min_delta else without_progress + 1
            best = min(best, loss)
        return without_progress >= self.settings.patience
