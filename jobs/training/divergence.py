"""Tells a loss that has diverged from one that is noisy: pure, and of one mind on all ranks, which see the same losses."""

from collections import deque
from collections.abc import Iterable
from statistics import median

from conf.errors import DivergedError, Problem

WINDOW = 21
"""Losses whose median is compared: a spike of up to ten steps, however high, does not move it far."""
PATIENCE = 50
"""Steps that the median must stay up: spikes and the end of a warm-up heal within fewer."""


class Divergence:
    """Remembers the best median of `WINDOW` losses, and since when the present one lies too far above it.

    A run that goes on gives the losses before its checkpoint, and so knows what one without interruption knows.
    """

    def __init__(self, max_rise: float | None, losses: Iterable[float] = ()) -> None:
        self.max_rise = max_rise
        """In nats, the unit of the loss: a median this far above the best is a step too many. None never is."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._best, self._above = float("inf"), 0
        for loss in losses:
            self._add(loss)

    def see(self, step: int, loss: float) -> None:
        """Take the loss of a step, counted from 1. Raises DivergedError where it has been too high for too long."""
        self._add(loss)
        if self._above >= PATIENCE:
            raise DivergedError(
                Problem(
                    "train.max_loss_rise",
                    self.max_rise,
                    f"step {step}: the loss (median of {WINDOW} steps) went from {self._best:.4f} to "
                    f"{median(self._losses):.4f}, and has stayed up since step {step - PATIENCE + 1}: training has diverged. "
                    "Nothing after the last checkpoint was saved. Start a new run with a smaller train.learning_rate, a longer "
                    "train.warmup_steps or cleaner data; resume=RUN train.max_loss_rise=null goes on all the same",
                )
            )

    def _add(self, loss: float) -> None:
        self._losses.append(loss)
        if self.max_rise is None or len(self._losses) < WINDOW:
            return
        now = median(self._losses)
        self._best = min(self._best, now)
        self._above = self._above + 1 if now > self._best + self.max_rise else 0
