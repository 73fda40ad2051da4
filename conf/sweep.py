"""What the launcher and the jobs both know of a sweep: names of its files, and when its worst runs end."""

from __future__ import annotations  # the node's own Python 3.9 runs this too, outside the container

import math
import re
from typing import NamedTuple

FILE = "sweep.json"
"""In the folder of a sweep: its runs and its jobs."""
RUNG = "rung.json"
"""In the folder of a run: its loss at the step at which the worst runs of the sweep end, and whether it ended there."""
FORM = re.compile(r"(0?\.\d+)@(\d+(?:\.\d+)?)%")


class StopWorst(NamedTuple):
    """`sweep.stop_worst`: the worst `share` of the runs ends after the part `at` of its steps."""

    share: float
    at: float

    def step(self, last_step: int) -> int:
        """The step, counted from 1, after which a training of `last_step` steps is compared."""
        return max(1, math.ceil(self.at * last_step))

    def goes_on(self, loss: float, others: list[float]) -> bool:
        """Whether a run is among the best of those compared so far. `others`: the losses of the other runs. NaN is the worst."""
        kept = math.ceil((len(others) + 1) * (1 - self.share))
        own, *rest = (math.inf if math.isnan(item) else item for item in (loss, *others))
        return sum(other < own for other in rest) < kept


def stop_worst(text: str) -> StopWorst:
    """Read `0.5@25%`. Raises ValueError for any other text."""
    match = FORM.fullmatch(text)
    if match is None or not 0 < float(match[1]) < 1 or not 0 < float(match[2]) < 100:
        raise ValueError(text)
    return StopWorst(float(match[1]), float(match[2]) / 100)
