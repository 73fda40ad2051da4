"""Token rows as preprocess wrote them, and which of them each rank gets at each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conf.errors import DataError, Problem
from conf.files import read_json
from jobs.packing import Packs, pack

IGNORED = -100
"""Label of a token that is not trained; cross_entropy's own."""


@dataclass(frozen=True)
class Rows:
    """One split, mapped from disk: sample i is tokens[offsets[i]:offsets[i + 1]], and a row holds the samples of one pack.

    `lengths` and `counts` are the tokens and the trained tokens of each row, int64 of shape (rows,).
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    packs: Packs
    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.packs)


def read(folder: Path, split: str, pack_into: int | None = None) -> Rows:
    """Open a split of RUN/data: a sample a row, or packed into rows of at most `pack_into` tokens.

    Raises DataError where preprocess has not completed.
    """
    if read_json(folder / "data.json") is None:
        raise DataError(
            Problem("data", folder, "is not there or not whole: run the preprocess job first (pipeline=preprocess)")
        )
    arrays = (np.load(folder / f"{split}.{part}.npy", mmap_mode="r") for part in ("tokens", "trained", "offsets"))
    return arrange(*arrays, pack_into)


def arrange(
    tokens: NDArray[np.int32], trained: NDArray[np.uint8], offsets: NDArray[np.int64], pack_into: int | None = None
) -> Rows:
    """Rows over these samples; what is packed together depends on their lengths alone."""
    offsets = np.asarray(offsets, dtype=np.int64)
    lengths, alone = np.diff(offsets), np.arange(len(offsets))
    packs = Packs(alone[:-1], alone) if pack_into is None else pack(lengths, pack_into)
    counts = _trained_labels(trained, offsets)
    return Rows(
        tokens, trained, offsets, packs, packs.sums(lengths).astype(np.int64), packs.sums(counts).astype(np.int64)
    )


def _trained_labels(trained: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Trained tokens of each sample, but for its first: nothing predicts that one."""
    if len(offsets) == 1:
        return np.zeros(0, dtype=np.int64)
    return np.add.reduceat(trained, offsets[:-1], dtype=np.int64) - trained[offsets[:-1]]


def batch(rows: Rows, chosen: NDArray[np.int64], pad: int, multiple: int = 8) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest, rounded up: `input_ids` and `labels`, int64 of shape (rows, length).

    Under causal attention padding on the right reaches no real token, so no mask is needed. Where a row holds several
    samples there are also `position_ids`, which begin again at each: transformers keeps attention inside them.
    """
    length = max(1, -(-int(rows.lengths[chosen].max(initial=1)) // multiple)) * multiple
    ids = np.full((len(chosen), length), pad, dtype=np.int64)
    labels = np.full((len(chosen), length), IGNORED, dtype=np.int64)
    positions = np.tile(np.arange(length), (len(chosen), 1))
    packed = False
    for line, row in enumerate(chosen):
        at, samples = 0, rows.packs.row(row)
        packed |= len(samples) > 1
        for sample in samples:
            span = slice(rows.offsets[sample], rows.offsets[sample + 1])
            end = at + span.stop - span.start
            ids[line, at:end] = rows.tokens[span]
            labels[line, at:end] = np.where(rows.trained[span], rows.tokens[span], IGNORED)
            labels[line, at] = IGNORED
            positions[line, at:] = np.arange(length - at)
            at = end
        positions[line, at:] = np.arange(length - at)  # padding is a sample of its own
    made = {"input_ids": ids, "labels": labels} | ({"position_ids": positions} if packed else {})
    return {name: torch.from_numpy(value) for name, value in made.items()}


def at_step(rows: Rows, step: int, global_batch: int, seed: int) -> NDArray[np.int64]:
    """The rows of one step's global batch, sorted by length: a function of the step alone, whatever the number of ranks.

    Epochs follow each other without a gap, each a new permutation, so every row comes once an epoch.
    """
    positions = np.arange(step * global_batch, (step + 1) * global_batch)
    chosen = np.empty(global_batch, dtype=np.int64)
    for epoch in range(int(positions[0] // len(rows)), int(positions[-1] // len(rows)) + 1):
        inside = positions // len(rows) == epoch
        chosen[inside] = _order(len(rows), seed, epoch)[positions[inside] % len(rows)]
    return chosen[np.argsort(rows.lengths[chosen], kind="stable")]


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def micro_batches(
    chosen: NDArray[np.int64], micro_batch: int, rank: int, world_size: int
) -> Iterator[NDArray[np.int64]]:
    """This rank's rows, one micro batch after the other; ranks hold rows of like length at the same time."""
    for start in range(rank * micro_batch, len(chosen), micro_batch * world_size):
        yield chosen[start : start + micro_batch]
