"""Compares the measurements of all ranks and warns about a rank that is slow, idle, or uses much more memory than the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

GIB = 2**30
MEMORY_RATIO, MEMORY_EXCESS_BYTES = 1.1, 1 * GIB
"""A rank is warned about if its peak is above this ratio of the median, and at least this many bytes above it."""
SLOW_RATIO = 1.25
"""A rank is slow if it needs more than this ratio of the median rank's time for the same work."""
IDLE_RATIO = 0.5
"""A rank is idle if it works less than this ratio of the median rank's time: it then waits for the others."""
LINES_IN_A_ROW = 3
"""Log lines in a row that must agree before a warning: in one step, a rank may get short rows by chance."""


@dataclass
class StragglerDetector:
    """Warns once about each rank and kind of problem, and again only if the problem went away and came back."""

    hosts: Sequence[str]
    """Host name of each rank."""
    _lines_in_a_row: dict[tuple[int, str], int] = field(default_factory=dict)

    def warnings(
        self, *, memory: NDArray[np.float64], busy: NDArray[np.float64], cost: NDArray[np.float64]
    ) -> list[str]:
        """The new warnings of one log line. Each array has one value per rank, float64 of shape (ranks,).

        `memory` is peak memory in bytes, `busy` is seconds of the rank's own work without waiting, and `cost` is what this
        work should take, in any unit.
        """
        pace = busy / np.maximum(cost, 1e-9)
        usual_memory, usual_pace, usual_busy = (float(np.median(values)) for values in (memory, pace, busy))
        memory_limit = max(MEMORY_RATIO * usual_memory, usual_memory + MEMORY_EXCESS_BYTES)
        messages = []
        for rank, host in enumerate(self.hosts):
            name = f"rank {rank} on {host}"
            if self._is_new(rank, "memory", memory[rank] > memory_limit, after=1):
                messages.append(
                    f"{name} has peaked at {memory[rank] / GIB:.1f} GiB of memory, the median rank at "
                    f"{usual_memory / GIB:.1f} GiB"
                )
            if self._is_new(rank, "slow", pace[rank] > SLOW_RATIO * usual_pace, after=LINES_IN_A_ROW):
                messages.append(
                    f"{name} is slow: it needs {pace[rank] / usual_pace:.2f} times the median rank's time for the same work, "
                    "and the others wait for it. Check its clocks, temperature and other processes, or exclude the node with "
                    "cluster.train.exclude"
                )
            if self._is_new(rank, "idle", busy[rank] < IDLE_RATIO * usual_busy, after=LINES_IN_A_ROW):
                messages.append(
                    f"{name} is idle: it works {busy[rank] / usual_busy:.0%} of the median rank's time and waits for the "
                    "others. data.packing=true or data.order=balanced give all ranks the same amount of work"
                )
        return messages

    def _is_new(self, rank: int, kind: str, holds: bool, *, after: int) -> bool:
        """Whether a condition now holds for the `after`-th log line in a row. A longer row is not reported again."""
        count = self._lines_in_a_row.get((rank, kind), 0) + 1 if holds else 0
        self._lines_in_a_row[rank, kind] = count
        return count == after


def summary(name: str, values: NDArray[np.float64], digits: int = 2) -> dict[str, float]:
    """Minimum, median and maximum over ranks as {NAME_min, NAME_median, NAME_max}, rounded."""
    low, middle, high = np.quantile(values, (0, 0.5, 1)).tolist()
    return {f"{name}_{word}": round(value, digits) for word, value in (("min", low), ("median", middle), ("max", high))}
