"""Chooses the rows of each optimizer step: every row once per epoch, the same rows on any number of ranks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

OrderKind = Literal["balanced", "random", "length", "file"]

SORTED_STEPS = 50
"""Steps whose rows are sorted by length together, as in a Trainer's `group_by_length`."""
NOISE = 0.005
"""Random share added to a row's cost in each epoch. Without it, rows of nearly equal cost would share a step in every epoch."""


@dataclass(frozen=True, eq=False)
class RowSampler:
    """Chooses the rows of any step, from the step number alone.

    Every rank computes the rows of the whole global batch, and `batches.micro_batches` divides them over the ranks. So a run can
    resume on more or fewer ranks, and no row is lost or repeated.

    costs: training cost of each row in any unit (sums of `packing.attention_cost`), above 0, shape (rows,).
    global_batch: rows per step. Epochs follow each other without a gap, so a step can contain rows of two epochs:
        epoch e begins e * rows % global_batch rows into a step.
    kind: how an epoch is ordered.
        balanced: rows of a step have similar cost, and steps come in random order. All ranks then finish a step at about
            the same time, whatever their number. A step in two epochs is the exception: its rows have any cost.
        random: one random permutation per epoch.
        length: a random permutation whose rows are sorted by cost within every `SORTED_STEPS` steps, the most costly first, so that
            the rows of a step need little padding.
        file: the order in which preprocess wrote the rows, in every epoch.

    Raises ValueError if there are no rows, a cost is not above 0, the batch is below 1 or the kind is unknown.
    """

    costs: NDArray[np.float64]
    global_batch: int
    seed: int
    kind: OrderKind

    def __post_init__(self) -> None:
        if self.costs.ndim != 1 or not len(self.costs):
            raise ValueError(f"costs: shape {self.costs.shape} must be (rows,), with at least one row")
        if not (np.isfinite(self.costs) & (self.costs > 0)).all():
            raise ValueError("costs: each must be finite and above 0; a row without tokens cannot be in a batch")
        if self.global_batch < 1:
            raise ValueError(f"global_batch={self.global_batch}: a step takes at least one row")
        if self.kind not in get_args(OrderKind):
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(get_args(OrderKind))}")

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """The rows of a step (the first is 0): int64, shape (global_batch,), the cheapest row first.

        They are sorted because `batches.micro_batches` gives neighboring rows to all ranks at the same time, and
        neighbors differ least in cost.
        """
        rows, start = len(self.costs), step * self.global_batch
        end = start + self.global_batch
        parts = []
        for epoch in range(start // rows, -(-end // rows)):
            first = epoch * rows
            parts.append(_rows_of_epoch(self, epoch)[max(start - first, 0) : end - first])
        chosen = np.concatenate(parts).astype(np.int64)
        return chosen[np.argsort(self.costs[chosen], kind="stable")]


@lru_cache(maxsize=2)  # a step has rows of at most two epochs, unless an epoch is shorter than a step
def _rows_of_epoch(sampler: RowSampler, epoch: int) -> NDArray[np.int32] | NDArray[np.int64]:
    """All rows once, in the order in which the steps take them: shape (rows,)."""
    row_count, batch = len(sampler.costs), sampler.global_batch
    # the cache keeps this array for the whole epoch, so it is int32 (4 bytes per row) if the row numbers fit
    rows: NDArray[np.int32] | NDArray[np.int64]
    rows = np.arange(row_count, dtype=np.int32) if row_count < 2**31 else np.arange(row_count, dtype=np.int64)
    if sampler.kind == "file":
        return rows
    random = np.random.default_rng([sampler.seed, epoch])
    random.shuffle(rows)
    head = -epoch * row_count % batch  # rows that complete the last, partial step of the epoch before
    steps = max(0, row_count - head) // batch
    if sampler.kind == "balanced" and steps:
        whole_steps = rows[head : head + steps * batch]
        noisy_costs = sampler.costs[whole_steps] * (1 + NOISE * random.random(len(whole_steps)))
        # A stable sort: numpy's default sort uses other instructions on other CPUs, and nodes would disagree on equal costs.
        similar = whole_steps[np.argsort(noisy_costs, kind="stable")].reshape(steps, batch)
        whole_steps[:] = random.permutation(similar).ravel()
    if sampler.kind == "length":
        for begin in range(0, row_count, SORTED_STEPS * batch):
            part = rows[begin : begin + SORTED_STEPS * batch]
            part[:] = part[np.argsort(-sampler.costs[part], kind="stable")]
    return rows
