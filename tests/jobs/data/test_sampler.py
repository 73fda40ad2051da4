"""Which rows a step has, and how long ranks wait for each other."""

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from jobs.data import batches, packing
from jobs.data.sampler import SORTED_STEPS, RowSampler

DISTRIBUTIONS = {"mean 643": (5.9964, 1.0, 4096), "mean 1619": (7.1982, 0.7, 4096), "mean 1274": (6.5957, 1.1, 8192)}
FACTOR = 8192
"""hidden_factor for `attention_cost`, small as with slow attention kernels: a row of 4096 tokens costs half as much again."""


def lognormal_order(rows, global_batch, kind="balanced", seed=0):
    return RowSampler(np.random.default_rng(5).lognormal(6, 1, rows), global_batch, seed, kind)


def sequence(order, steps):
    return np.concatenate([order.rows_of(step) for step in range(steps)])


def costs_of(distribution, packed, samples=150_000):
    """The cost of each row: rows of packed samples, or one sample per row."""
    mean, deviation, capacity = DISTRIBUTIONS[distribution]
    lengths = np.random.default_rng(0).lognormal(mean, deviation, samples)
    lengths = np.clip(lengths.astype(np.int64), 1, capacity)
    costs = packing.attention_cost(lengths, FACTOR)
    return packing.pack(lengths, capacity).sums(costs) if packed else costs


def by_rank(chosen, micro_batch, world_size):
    """The rows that ranks process at the same time: shape (micro-steps, ranks, rows of a micro batch)."""
    ranks = [list(batches.micro_batches(chosen, micro_batch, rank, world_size)) for rank in range(world_size)]
    return np.array(ranks).transpose(1, 0, 2)


def spread(costs, dealt):
    """(max - min) / mean over ranks of the cost that they process at the same time: shape (micro-steps,)."""
    together = costs[dealt].sum(axis=2)
    return (together.max(axis=1) - together.min(axis=1)) / together.mean(axis=1)


def test_rows_of_similar_length_share_a_step_and_need_less_padding() -> None:
    """As little as in transformers' own order for group_by_length."""
    lengths = lognormal_order(4000, 8).costs

    def padded(steps: list[list[int]]) -> float:
        return sum(8 * lengths[rows].max() for rows in steps) / lengths.sum()

    def ours(kind: str) -> float:
        order = lognormal_order(4000, 8, kind)
        return padded([order.rows_of(step).tolist() for step in range(500)])

    indices = get_length_grouped_indices(lengths.tolist(), 8, SORTED_STEPS, torch.Generator().manual_seed(0))
    theirs = padded([indices[begin : begin + 8] for begin in range(0, 4000, 8)])
    assert ours("random") > 2
    assert ours("length") == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("kind", ["balanced", "random", "length", "file"])
@pytest.mark.parametrize(
    ("rows", "global_batch"),
    [(1, 1), (1, 4), (3, 8), (8, 8), (7, 3), (10, 4), (64, 8), (101, 8), (9, 8), (15, 8), (23, 8), (5, 12)],
)
def test_every_row_comes_once_per_epoch(rows, global_batch, kind) -> None:
    order = lognormal_order(rows, global_batch, kind)
    seen = []
    for step in range(5 * rows):
        chosen = order.rows_of(step)
        assert chosen.shape == (global_batch,)
        assert chosen.dtype == np.int64
        assert (np.diff(order.costs[chosen]) >= 0).all()
        seen.extend(chosen)
        counts, ended = np.bincount(seen, minlength=rows), (step + 1) * global_batch // rows
        assert counts.min() == ended, "a finished epoch has every row"
        assert counts.max() <= ended + 1, "no row comes twice in the current epoch"


def test_every_row_comes_once_per_epoch_if_the_number_of_ranks_changes() -> None:
    order, seen = lognormal_order(96, 12), []
    for step in range(8):
        chosen = order.rows_of(step)
        seen.extend(by_rank(chosen, 3, 4).ravel() if step < 4 else by_rank(chosen, 2, 2).ravel())
    assert sorted(seen) == list(range(96))


@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_the_order_depends_on_seed_and_epoch_and_needs_no_history(kind) -> None:
    order = lognormal_order(96, 8, kind)
    first, second, other = (
        sequence(order, 12),
        sequence(order, 24)[96:],
        sequence(lognormal_order(96, 8, kind, seed=1), 12),
    )
    assert np.array_equal(first, sequence(lognormal_order(96, 8, kind), 12))
    assert np.array_equal(lognormal_order(96, 8, kind).rows_of(17), order.rows_of(17))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_random_is_one_permutation_per_epoch() -> None:
    order = lognormal_order(20, 5, "random", seed=3)
    plain = np.concatenate([np.random.default_rng([3, epoch]).permutation(20) for epoch in (0, 1)]).reshape(8, 5)
    for step in range(8):
        assert set(order.rows_of(step)) == set(plain[step])


def test_file_is_the_order_of_the_file_in_every_epoch() -> None:
    order = lognormal_order(10, 4, "file")
    for step in range(10):
        assert sorted(order.rows_of(step)) == sorted(np.arange(4 * step, 4 * step + 4) % 10)


def test_the_next_epoch_combines_other_rows_in_a_step() -> None:
    order = RowSampler(np.linspace(100, 101, 400), 4, 0, "balanced")
    epochs = [{tuple(order.rows_of(step)) for step in range(start, start + 100)} for start in (0, 100)]
    assert len(epochs[0] & epochs[1]) < 10


def test_only_steps_in_two_epochs_have_rows_of_different_cost() -> None:
    order = RowSampler(np.linspace(1, 100, 1003), 8, 0, "balanced")
    for step in range(5 * 1003 // 8):
        chosen = order.costs[order.rows_of(step)]
        in_two = step * 8 // 1003 != (step * 8 + 7) // 1003
        assert in_two == (chosen[-1] - chosen[0] > 4)


def test_steps_are_not_sorted_by_cost() -> None:
    order = lognormal_order(8000, 8)
    means = np.array([order.costs[order.rows_of(step)].mean() for step in range(1000)])
    assert abs(np.corrcoef(means, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_balanced_ranks_wait_less_than_with_a_random_order(distribution, packed) -> None:
    costs = costs_of(distribution, packed)
    order = RowSampler(costs, 64, 0, "balanced")
    steps = len(costs) // 64
    chosen = sequence(order, steps)
    shuffled = np.random.default_rng(0).permutation(len(costs))[: steps * 64]
    for world_size, micro_batch in [(2, 1), (2, 32), (4, 4), (8, 8), (16, 1), (16, 4), (32, 2), (64, 1)]:
        even = spread(costs, by_rank(chosen, micro_batch, world_size))
        naive = spread(costs, by_rank(shuffled, micro_batch, world_size))
        assert np.percentile(even, 95) <= 0.02
        assert np.percentile(naive, 95) > 5 * np.percentile(even, 95)


@pytest.mark.parametrize(
    ("costs", "global_batch", "kind", "message"),
    [
        ([], 4, "balanced", "at least one row"),
        ([[1.0]], 4, "balanced", r"shape \(1, 1\)"),
        ([1.0, 0.0], 4, "balanced", "above 0"),
        ([1.0, np.nan], 4, "random", "above 0"),
        ([1.0], 0, "balanced", "global_batch=0"),
        ([1.0], 1, "shuffled", "kind='shuffled': must be one of balanced, random, length, file"),
    ],
)
def test_invalid_arguments_are_refused(costs, global_batch, kind, message) -> None:
    with pytest.raises(ValueError, match=message):
        RowSampler(np.array(costs), global_batch, 0, kind)
