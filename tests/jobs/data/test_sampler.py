"""Which rows a step holds, and how long ranks wait for each other."""

import numpy as np
import pytest

from jobs.data import batches, packing
from jobs.data.sampler import Order

LAWS = {"mean 643": (5.9964, 1.0, 4096), "mean 1619": (7.1982, 0.7, 4096), "mean 1274": (6.5957, 1.1, 8192)}
FACTOR = 8192
"""`attention_cost`'s, as where attention is slow: a long row costs half as much again."""


def made(rows, global_batch, kind="balanced", seed=0):
    return Order(np.random.default_rng(5).lognormal(6, 1, rows), global_batch, seed, kind)


def sequence(order, steps):
    return np.concatenate([order.rows_of(step) for step in range(steps)])


def costs_of(law, packed, samples=150_000):
    """The cost of each row of a ragged law: packed, or a sample a row."""
    middle, width, capacity = LAWS[law]
    drawn = np.random.default_rng(0).lognormal(middle, width, samples)
    lengths = np.clip(drawn.astype(np.int64), 1, capacity)
    costs = packing.attention_cost(lengths, FACTOR)
    return packing.pack(lengths, capacity).sums(costs) if packed else costs


def dealt(chosen, micro_batch, world_size):
    """What ranks run at the same time: (micro-steps, ranks, rows of a micro batch)."""
    ranks = [list(batches.micro_batches(chosen, micro_batch, rank, world_size)) for rank in range(world_size)]
    return np.array(ranks).transpose(1, 0, 2)


def spread(costs, dealt):
    """(max - min) / mean over ranks of the cost that they process at the same time: shape (micro-steps,)."""
    together = costs[dealt].sum(axis=2)
    return (together.max(axis=1) - together.min(axis=1)) / together.mean(axis=1)


@pytest.mark.parametrize("kind", ["balanced", "random", "file"])
@pytest.mark.parametrize(
    ("rows", "global_batch"),
    [(1, 1), (1, 4), (3, 8), (8, 8), (7, 3), (10, 4), (64, 8), (101, 8), (9, 8), (15, 8), (23, 8), (5, 12)],
)
def test_every_row_comes_once_an_epoch(rows, global_batch, kind):
    order = made(rows, global_batch, kind)
    seen = []
    for step in range(5 * rows):
        chosen = order.rows_of(step)
        assert chosen.shape == (global_batch,)
        assert chosen.dtype == np.int64
        assert (np.diff(order.costs[chosen]) >= 0).all()
        seen.extend(chosen)
        counts, ended = np.bincount(seen, minlength=rows), (step + 1) * global_batch // rows
        assert counts.min() == ended, "an epoch that has ended is whole"
        assert counts.max() <= ended + 1, "no row comes twice in the next"


def test_every_row_comes_once_an_epoch_though_the_ranks_change_within_it():
    order, seen = made(96, 12), []
    for step in range(8):
        chosen = order.rows_of(step)
        seen.extend(dealt(chosen, 3, 4).ravel() if step < 4 else dealt(chosen, 2, 2).ravel())
    assert sorted(seen) == list(range(96))


@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_seed_and_epoch_draw_the_order_and_steps_need_no_history(kind):
    order = made(96, 8, kind)
    first, second, other = (
        sequence(order, 12),
        sequence(order, 24)[96:],
        sequence(made(96, 8, kind, seed=1), 12),
    )
    assert np.array_equal(first, sequence(made(96, 8, kind), 12))
    assert np.array_equal(made(96, 8, kind).rows_of(17), order.rows_of(17))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_random_is_one_permutation_of_each_epoch():
    order = made(20, 5, "random", seed=3)
    plain = np.concatenate([np.random.default_rng([3, epoch]).permutation(20) for epoch in (0, 1)]).reshape(8, 5)
    for step in range(8):
        assert set(order.rows_of(step)) == set(plain[step])


def test_file_is_the_order_of_the_file_in_every_epoch():
    order = made(10, 4, "file")
    for step in range(10):
        assert sorted(order.rows_of(step)) == sorted(np.arange(4 * step, 4 * step + 4) % 10)


def test_other_rows_meet_in_another_epoch_though_no_step_lies_in_two():
    order = Order(np.linspace(100, 101, 400), 4, 0, "balanced")
    epochs = [{tuple(order.rows_of(step)) for step in range(start, start + 100)} for start in (0, 100)]
    assert len(epochs[0] & epochs[1]) < 10


def test_only_the_steps_that_lie_in_two_epochs_are_uneven():
    order = Order(np.linspace(1, 100, 1003), 8, 0, "balanced")
    for step in range(5 * 1003 // 8):
        chosen = order.costs[order.rows_of(step)]
        in_two = step * 8 // 1003 != (step * 8 + 7) // 1003
        assert in_two == (chosen[-1] - chosen[0] > 4)


def test_steps_are_not_sorted_by_cost():
    order = made(8000, 8)
    means = np.array([order.costs[order.rows_of(step)].mean() for step in range(1000)])
    assert abs(np.corrcoef(means, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_ranks_finish_together_where_a_shuffle_lets_them_wait(law, packed):
    costs = costs_of(law, packed)
    order = Order(costs, 64, 0, "balanced")
    steps = len(costs) // 64
    chosen = sequence(order, steps)
    shuffled = np.random.default_rng(0).permutation(len(costs))[: steps * 64]
    for world_size, micro_batch in [(2, 1), (2, 32), (4, 4), (8, 8), (16, 1), (16, 4), (32, 2), (64, 1)]:
        even = spread(costs, dealt(chosen, micro_batch, world_size))
        naive = spread(costs, dealt(shuffled, micro_batch, world_size))
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
        ([1.0], 1, "shuffled", "kind='shuffled': must be one of balanced, random, file"),
    ],
)
def test_what_has_no_order_is_refused(costs, global_batch, kind, message):
    with pytest.raises(ValueError, match=message):
        Order(np.array(costs), global_batch, 0, kind)
