"""Notices that the loss does not fall: most often the template is not the model's, or the learning rate is far too low."""

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 21
"""The number of losses in a median."""
STEPS = 200
"""Steps after the warmup within which every fine-tune that learns has reduced its loss."""
SMALLEST_FALL = 0.01
"""Part of the first median by which the loss must have fallen."""


class FlatLossWatch:
    """Compares the median of the first losses with that of the newest, once, `STEPS` steps after the warmup."""

    def __init__(self, warmup_steps: int, learning_rate: float, losses: Iterable[float] = ()) -> None:
        """`losses` are those before the checkpoint of a resumed run."""
        self.at_step, self.learning_rate = warmup_steps + STEPS, learning_rate
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        for loss in losses:
            self._add(loss)

    def add_loss(self, step: int, loss: float) -> str | None:
        """Add the loss of a step, counted from 1. Returns what to look at if the loss has not fallen by now, else None."""
        self._add(loss)
        if step != self.at_step or len(self._first) < WINDOW:
            return None
        first, last = median(self._first), median(self._last)
        if last <= first * (1 - SMALLEST_FALL):
            return None
        return (
            f"the loss does not fall: {first:.4f} at first, {last:.4f} after {step} steps. Look in preview.html whether the "
            f"template is that of the model and the right text is trained, and whether train.learning_rate={self.learning_rate:g} "
            "is too low. It is also flat for rows that the model knows already"
        )

    def _add(self, loss: float) -> None:
        if len(self._first) < WINDOW:
            self._first.append(loss)
        self._last.append(loss)
