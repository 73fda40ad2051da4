"""Which rows make up each optimizer step: every row once an epoch, the same rows on any number of ranks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["balanced", "random", "file"]

BLUR = 0.005
"""Share of a row's cost that is drawn anew each epoch: without it, neighbours in cost would meet in every epoch."""


@dataclass(frozen=True, eq=False)
class Order:
    """The rows of any step, from its number alone, so that a run resumes on more or fewer ranks with no row lost or twice.

    `costs` is what a row takes to train (`packing.attention_cost` added up), any unit, above 0, shape (rows,);
    `global_batch` is in rows. Epochs follow each other without a gap: epoch e begins e * rows % global_batch rows into a
    step. `kind` says how an epoch is ordered:
    - balanced: a step holds rows of like cost, in random order of steps, so that ranks, however many, finish together.
      Rows of a step that lies in two epochs are drawn from all of each, and cost what they cost.
    - random: one permutation an epoch.
    - file: as preprocess wrote them, in every epoch.
    Raises ValueError for no rows, a cost that is not above 0, a batch below 1 or an unknown kind.
    """

    costs: NDArray[np.float64]
    global_batch: int
    seed: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.costs.ndim != 1 or not len(self.costs):
            raise ValueError(f"costs: shape {self.costs.shape} is not one number for each of at least one row")
        if not (np.isfinite(self.costs) & (self.costs > 0)).all():
            raise ValueError("costs: each must be finite and above 0; a row without tokens has no place in a batch")
        if self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch}: a step takes at least one row")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(get_args(Kind))}")

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """The global batch of a step (0 is the first), int64 of shape (global_batch,), the cheapest row first.

        Sorted, because `data.micro_batches` deals neighbours to ranks at the same time: they differ least.
        """
        rows, start = len(self.costs), step * self.global_batch
        end = start + self.global_batch
        parts = []
        for epoch in range(start // rows, -(-end // rows)):
            first = epoch * rows
            parts.append(_epoch(self, epoch)[max(start - first, 0) : end - first])
        chosen = np.concatenate(parts).astype(np.int64)
        return chosen[np.argsort(self.costs[chosen], kind="stable")]


def spread(costs: NDArray[np.float64], dealt: NDArray[np.int64]) -> NDArray[np.float64]:
    """(max - min) / mean over ranks of what they run at the same time: the share of it that the fastest rank waits.

    `costs` of shape (rows,); `dealt` are row numbers of shape (micro-steps, ranks, rows of a micro batch), as
    `data.micro_batches` deals them. Returns float64 of shape (micro-steps,), where 0.02 is 2 %.
    """
    found = np.asarray(costs, dtype=np.float64)[dealt].sum(axis=2)
    apart: NDArray[np.float64] = (found.max(axis=1) - found.min(axis=1)) / found.mean(axis=1)
    return apart


@lru_cache(maxsize=2)  # a step may lie in two epochs; where it lies in more, they are short
def _epoch(order: Order, epoch: int) -> NDArray[np.int32] | NDArray[np.int64]:
    """All rows once, in the order in which steps take them."""
    rows, batch = len(order.costs), order.global_batch
    drawn: NDArray[np.int32] | NDArray[np.int64]  # kept for the epoch: 4 bytes a row
    drawn = np.arange(rows, dtype=np.int32) if rows < 2**31 else np.arange(rows, dtype=np.int64)
    if order.kind == "file":
        return drawn
    random = np.random.default_rng([order.seed, epoch])
    random.shuffle(drawn)
    head = -epoch * rows % batch  # rows that complete the step in which the epoch before ended
    steps = max(0, rows - head) // batch
    if order.kind == "balanced" and steps:
        whole = drawn[head : head + steps * batch]
        blurred = order.costs[whole] * (1 + BLUR * random.random(len(whole)))
        # Stable, so that nodes with other processors, where numpy sorts by other instructions, agree on equal costs.
        alike = whole[np.argsort(blurred, kind="stable")].reshape(steps, batch)
        whole[:] = random.permutation(alike).ravel()
    return drawn
