"""Compares ranks: what each of them measured, and a warning, with rank and host, where one is unlike the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

GIB = 2**30
MORE_MEMORY, AT_LEAST = 1.1, 1 * GIB
"""A peak is an outlier above this times the median, and by at least so many bytes."""
SLOW, IDLE = 1.25, 0.5
"""Of the median: above the one a rank is slow for the work it has, below the other it has little to do and waits."""
IN_A_ROW = 3
"""Lines of the log that must say so: rows of a step may by chance be short on one rank."""


@dataclass
class Spread:
    """Remembers what was warned of, so that a warning comes once: again only after it had ceased to hold."""

    hosts: Sequence[str]
    """Of each rank."""
    _seen: dict[tuple[int, str], int] = field(default_factory=dict)

    def warnings(self, memory: NDArray[np.float64], busy: NDArray[np.float64], cost: NDArray[np.float64]) -> list[str]:
        """What to warn of. Peak bytes, seconds of own work without waiting, and what that work should cost, of each rank, any
        unit: float64 of shape (ranks,)."""
        pace = busy / np.maximum(cost, 1e-9)
        typical = [float(np.median(values)) for values in (memory, pace, busy)]
        found = []
        for rank, host in enumerate(self.hosts):
            where, over = f"rank {rank} on {host}", float(memory[rank])
            if self._due(rank, "memory", over > max(MORE_MEMORY * typical[0], typical[0] + AT_LEAST), 1):
                found.append(f"{where} has peaked at {over / GIB:.1f} GiB, the median rank at {typical[0] / GIB:.1f}")
            if self._due(rank, "slow", pace[rank] > SLOW * typical[1], IN_A_ROW):
                found.append(
                    f"{where} is slow: {pace[rank] / typical[1]:.2f} times the median rank's time for the same work; the "
                    "others wait for it. Look at its clocks, temperature and other processes, or leave it out with "
                    "cluster.train.exclude"
                )
            if self._due(rank, "idle", busy[rank] < IDLE * typical[2], IN_A_ROW):
                found.append(
                    f"{where} is idle: it works {busy[rank] / typical[2]:.0%} of the median rank's time, and waits for the "
                    "others; data.packing or data.order=balanced give ranks equal work"
                )
        return found

    def _due(self, rank: int, kind: str, holds: bool, times: int) -> bool:
        """Whether what holds now has held for so many times in a row, and is not said yet."""
        seen = self._seen[rank, kind] = self._seen.get((rank, kind), 0) + 1 if holds else 0
        return seen == times


def summary(name: str, values: NDArray[np.float64], digits: int = 2) -> dict[str, float]:
    """The least, the median and the most over ranks, under NAME_min, NAME_median and NAME_max."""
    low, middle, high = np.quantile(values, (0, 0.5, 1)).tolist()
    return {f"{name}_{word}": round(value, digits) for word, value in (("min", low), ("median", middle), ("max", high))}
