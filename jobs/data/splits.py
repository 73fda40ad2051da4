"""Chooses the samples of each epoch and the held-out samples, by their numbers only; it reads no tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from conf.schema_model import DataSet

SampleNumbers = NDArray[np.int64]
"""Numbers of samples, counted from 0 across all sets in order."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class TrainingSets:
    """All training sets as one sequence of samples."""

    hashes: NDArray[np.uint64]
    """Hash of each sample's tokens and trained mask: shape (samples,)."""
    origins: NDArray[np.uint64]
    """For each sample, the hash of the first sample from the same row: shape (samples,)."""
    first: list[int]
    """Number of the first sample of each set, and at the end the number of all samples."""


def split_held_out(sets: TrainingSets, fraction: float, seed: int) -> tuple[SampleNumbers, SampleNumbers]:
    """(training samples, held-out samples). About `fraction` of the rows are held out: at least one, or none if it is 0.

    A hash of a row's tokens and the seed decides. So equal rows, and all samples of one row, are on the same side, and
    nothing is both held out and trained on. A row stays on its side when other rows are added. If all rows are equal, all of
    them are held out.
    """
    row_hashes = _mix(sets.origins, seed)
    held_out = row_hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    if fraction and len(row_hashes) and (held_out.all() or not held_out.any()):
        held_out = row_hashes == row_hashes.min()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_duplicates(samples: SampleNumbers, hashes: NDArray[np.uint64]) -> tuple[SampleNumbers, SampleNumbers]:
    """(first of each, the rest) of samples that are equal token for token. Both keep the order of `samples`."""
    _, first = np.unique(hashes[samples], return_index=True)
    kept = np.zeros(len(samples), dtype=bool)
    kept[first] = True
    return samples[kept], samples[~kept]


def apply_weights(
    samples: SampleNumbers, sets: TrainingSets, configs: Mapping[str, DataSet], seed: int
) -> SampleNumbers:
    """The samples of one epoch: from each set as many as its `weight` or `num_samples` asks.

    These are whole copies of the set, plus a random part chosen by the seed.
    """
    chosen = []
    for number, (config, (begin, end)) in enumerate(zip(configs.values(), pairwise(sets.first), strict=True)):
        available = samples[(samples >= begin) & (samples < end)]
        wanted = config.num_samples if config.num_samples is not None else round(config.weight * len(available))
        copies, rest = divmod(wanted, len(available)) if len(available) else (0, 0)
        part = np.random.default_rng([seed, number]).permutation(len(available))[:rest]
        chosen += [available] * copies + [available[np.sort(part)]]
    return np.concatenate(chosen) if chosen else samples


def find_overlap(held_out: NDArray[np.uint64], trained: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Indices into `held_out` of the hashes that are in `trained` too."""
    return np.flatnonzero(np.isin(held_out, trained))


def _mix(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """For each seed another uniform hash: the finalizer of splitmix64, Steele et al. 2014, doi:10.1145/2660193.2660195."""
    with np.errstate(over="ignore"):
        mixed = hashes + GOLDEN * np.uint64(seed % 2**64 + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))
