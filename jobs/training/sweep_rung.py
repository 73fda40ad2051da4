"""Ends the worst trainings of a sweep early (`sweep.stop_worst`): asynchronous successive halving (ASHA).

A run compares its loss with those of the runs that have come as far, and again when others come as far later. It waits for none
of them, so runs that have not started yet, or never will, hold up nobody.
"""

import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from conf import sweep
from conf.files import read_json, write_json
from conf.schema import Config

LAST_LOSSES = 21
"""Training losses whose median is compared where nothing is held out: that of one step depends on its rows."""
REVIEW_EVERY_S = 5.0
"""Seconds between two looks at the losses of the other runs. On a network file system each file is a round trip."""


def recorded_step(run: Path) -> int | None:
    """The step at which a run was compared in an earlier attempt. Rank 0 calls this for all ranks."""
    step = (read_json(run / sweep.RUNG) or {}).get("step")
    return step if isinstance(step, int) else None


class PlannedRung:
    """The step of this training at which it is compared, and what came of it. All ranks hold the same."""

    def __init__(
        self, config: Config, last_step: int, losses: Iterable[float] = (), *, recorded_step: int | None = None
    ) -> None:
        """`losses` are those before the checkpoint of a resumed run, and `recorded_step` is what `recorded_step` returned."""
        self._run, self._last_step, rule = Path(config.run_dir), last_step, config.sweep.stop_worst
        self._rule = sweep.stop_worst(rule) if rule is not None else None
        self._text = f"sweep.stop_worst={rule}"
        step = self._rule.step(last_step) if self._rule else last_step
        self.step = step if step < last_step else None
        """Counted from 1; None if the training is not compared."""
        self.recorded_step = recorded_step
        """The step at which it was compared in an earlier attempt."""
        self.is_over = False
        """Whether the training ends because it is one of the worst."""
        self._losses = deque(losses, maxlen=LAST_LOSSES)
        self._next_review = 0.0

    def is_due(self, step: int) -> bool:
        """Whether the training is compared after this step."""
        return step == self.step

    def add_loss(self, loss: float) -> None:
        """Add the training loss of a step."""
        self._losses.append(loss)

    def compare(self, step: int, held_out: float | None) -> bool:
        """Record the loss of this run for the others, and compare it. Only rank 0 calls this. Returns whether the run ends."""
        loss = median(self._losses) if held_out is None else held_out
        kind = "training" if held_out is None else "held-out"
        write_json(self._run / sweep.RUNG, {"step": step, "loss": loss, "kind": kind, "goes_on": True})
        return self._is_among_the_worst(loss)

    def review(self, step: int) -> bool:
        """Whether this run, after `step`, has been overtaken by runs that came as far later. Only rank 0 calls this."""
        if self.step is None or step <= self.step or time.monotonic() < self._next_review:
            return False
        self._next_review = time.monotonic() + REVIEW_EVERY_S
        own = read_json(self._run / sweep.RUNG) or {}
        return own.get("step") == self.step and self._is_among_the_worst(float(own["loss"]))

    def record_end(self, step: int) -> str:
        """Record that this run ends after `step`. Only rank 0 calls this. Returns why it ends."""
        own, others = read_json(self._run / sweep.RUNG) or {}, self._losses_of_others()
        better = sum(other < own["loss"] for other in others)
        why = (
            f"ended early at step {step} of {self._last_step} by {self._text}: at step {own['step']}, with a {own['kind']} loss of "
            f"{own['loss']:.4f}, {better} of {len(others)} other runs of the sweep were better"
        )
        write_json(self._run / sweep.RUNG, own | {"goes_on": False, "ended": step, "reason": why})
        return why

    def _is_among_the_worst(self, loss: float) -> bool:
        assert self._rule
        return not self._rule.goes_on(loss, self._losses_of_others())

    def _losses_of_others(self) -> list[float]:
        """What the other runs have recorded so far."""
        names = (read_json(self._run.parent / sweep.FILE) or {}).get("runs", {})
        found = (read_json(self._run.parent / name / sweep.RUNG) for name in names if name != self._run.name)
        return [float(item["loss"]) for item in found if item]
