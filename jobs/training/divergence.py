"""Detects that the loss has diverged, and not only fluctuates.

All ranks see the same losses and compute the same result, so no communication is needed.
"""

from collections import deque
from collections.abc import Iterable
from statistics import median

from conf.errors import DivergedError, Problem

WINDOW = 21
"""The number of losses in the median: a spike of up to ten steps, however high, does not move it far."""
PATIENCE = 50
"""The median must stay too high for this many steps. Spikes and the end of the warmup recover in fewer."""


class DivergenceDetector:
    """Compares the median of the last `WINDOW` losses with the lowest such median so far, and counts the steps it is too high."""

    def __init__(self, max_rise: float | None, losses: Iterable[float] = ()) -> None:
        """`losses` are those before the checkpoint of a resumed run, so that it decides as an uninterrupted run would."""
        self.max_rise = max_rise
        """In nats, the unit of the loss: a median further above the best than this is too high. None disables the check."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._best, self._above = float("inf"), 0
        for loss in losses:
            self._add(loss)

    def add_loss(self, step: int, loss: float) -> None:
        """Add the loss of a step, counted from 1. Raises DivergedError if the median has been too high for PATIENCE steps."""
        self._add(loss)
        if self._above >= PATIENCE:
            raise DivergedError(
                Problem(
                    "train.max_loss_rise",
                    self.max_rise,
                    f"step {step}: the loss (median of {WINDOW} steps) went from {self._best:.4f} to "
                    f"{median(self._losses):.4f} and has stayed that high since step {step - PATIENCE + 1}: training has diverged. "
                    "Nothing after the last checkpoint was saved. Start a new run with a lower train.learning_rate, more "
                    "train.warmup_steps or cleaner data, or go on from an earlier checkpoint: muster resume RUN "
                    "train.resume_step=N train.learning_rate=... "
                    "To turn this check off: muster resume RUN train.max_loss_rise=null",
                )
            )

    def _add(self, loss: float) -> None:
        self._losses.append(loss)
        if self.max_rise is None or len(self._losses) < WINDOW:
            return
        current = median(self._losses)
        self._best = min(self._best, current)
        self._above = self._above + 1 if current > self._best + self.max_rise else 0
