"""Ends the worst trainings of a sweep early (`sweep.stop_worst`): asynchronous successive halving, as ASHA's stopping rule.

A run compares its loss, once, with those of the runs that have come as far before it. It waits for none of them, so runs that
have not started yet, or never will, hold up nobody.
"""

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from conf import sweep
from conf.files import read_json, write_json
from conf.schema import Config

LAST_LOSSES = 21
"""Training losses whose median is compared where nothing is held out: that of one step depends on its rows."""


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
        self._run, rule = Path(config.run_dir), config.sweep.stop_worst
        self._rule = sweep.stop_worst(rule) if rule is not None else None
        step = self._rule.step(last_step) if self._rule else last_step
        self.step = step if step < last_step else None
        """Counted from 1; None if the training is not compared."""
        self.recorded_step = recorded_step
        """The step at which it was compared in an earlier attempt."""
        self.reason = ""
        """Why the training ends early; empty while it goes on."""
        self._losses = deque(losses, maxlen=LAST_LOSSES)

    @property
    def is_over(self) -> bool:
        """Whether the training ends because it was one of the worst."""
        return bool(self.reason)

    def is_due(self, step: int) -> bool:
        """Whether the training is compared after this step."""
        return step == self.step

    def add_loss(self, loss: float) -> None:
        """Add the training loss of a step."""
        self._losses.append(loss)

    def compare(self, step: int, held_out: float | None) -> str:
        """Compare this run with the others, and record its loss for them. Only rank 0 calls this. Returns why it ends, or ""."""
        assert self._rule
        loss = median(self._losses) if held_out is None else held_out
        others = self._losses_of_others()
        goes_on = self._rule.goes_on(loss, others)
        write_json(self._run / sweep.RUNG, {"step": step, "loss": loss, "goes_on": goes_on})
        better, kind = sum(other < loss for other in others), "training" if held_out is None else "held-out"
        text = f"{kind} loss {loss:.4f}, {better} of {len(others)} other runs of the sweep were better at this point"
        return "" if goes_on else text

    def _losses_of_others(self) -> list[float]:
        """What the other runs have recorded so far."""
        names = (read_json(self._run.parent / sweep.FILE) or {}).get("runs", {})
        found = (read_json(self._run.parent / name / sweep.RUNG) for name in names if name != self._run.name)
        return [float(item["loss"]) for item in found if item]
