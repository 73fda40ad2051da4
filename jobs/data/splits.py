"""Chooses the samples of an epoch and those held out, from the tokenised sets: numbers alone, so that it takes no time."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from conf.schema import DataSet

Samples = NDArray[np.int64]
"""Numbers of samples, counted through all sets in order."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sets:
    """All training sets: of each sample its hash and its row's, and of each set the number of its first sample (one more)."""

    hashes: NDArray[np.uint64]
    origins: NDArray[np.uint64]
    first: list[int]


def held_out(sets: Sets, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """(training, held out): about `fraction` of the rows, at least one, by a hash of their tokens and the seed.

    Equal rows stay on one side, as do the samples of one row, so none is held out and trained on too; a row keeps its side
    when others are added.
    """
    drawn = _mixed(sets.origins, seed)
    below = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    out = drawn < below
    if len(drawn) and not out.any():
        out = drawn == drawn.min()
    if out.all():  # all rows alike
        out = np.arange(len(drawn)) == 0
    return np.flatnonzero(~out), np.flatnonzero(out)


def without_duplicates(samples: Samples, hashes: NDArray[np.uint64]) -> tuple[Samples, Samples]:
    """(the first of each, the others) among samples that are equal token for token; both keep their order."""
    _, first = np.unique(hashes[samples], return_index=True)
    kept = np.zeros(len(samples), dtype=bool)
    kept[first] = True
    return samples[kept], samples[~kept]


def weighted(samples: Samples, sets: Sets, described: Mapping[str, DataSet], seed: int) -> Samples:
    """The samples of an epoch: of each set as many as its weight or number asks, whole copies and a random part by seed."""
    chosen = []
    for number, (one, (begin, end)) in enumerate(zip(described.values(), pairwise(sets.first), strict=True)):
        mine = samples[(samples >= begin) & (samples < end)]
        wanted = one.num_samples if one.num_samples is not None else round(one.weight * len(mine))
        copies, rest = divmod(wanted, len(mine)) if len(mine) else (0, 0)
        part = np.random.default_rng([seed, number]).permutation(len(mine))[:rest]
        chosen += [mine] * copies + [mine[np.sort(part)]]
    return np.concatenate(chosen) if chosen else samples


def overlap(held: NDArray[np.uint64], trained: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Which held-out samples are trained on too."""
    return np.flatnonzero(np.isin(held, trained))


def _mixed(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Another uniform hash of each for each seed: splitmix64's finaliser, Steele et al. 2014, doi:10.1145/2660193.2660195."""
    with np.errstate(over="ignore"):
        mixed = hashes + GOLDEN * np.uint64(seed % 2**64 + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))
