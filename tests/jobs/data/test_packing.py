"""Packing of samples into rows, and the cost of a row."""

import bisect

import numpy as np
import pytest

from jobs.data import packing

DISTRIBUTIONS = {"mean 643": (5.9964, 1.0, 4096), "mean 1619": (7.1982, 0.7, 4096), "mean 1274": (6.5957, 1.1, 8192)}


def draw_lengths(distribution, samples, seed=0):
    """(lognormal sample lengths, clipped to a row as preprocess truncates them; capacity of the row)."""
    mean, deviation, capacity = DISTRIBUTIONS[distribution]
    lengths = np.random.default_rng(seed).lognormal(mean, deviation, samples)
    return np.clip(lengths.astype(np.int64), 1, capacity), capacity


def slow_best_fit_decreasing(lengths, capacity):
    """How many rows the textbook algorithm needs, which places one sample after the other."""
    rooms = []
    rows = 0
    for length in sorted(lengths.tolist(), reverse=True):
        best = bisect.bisect_left(rooms, length)
        room = rooms.pop(best) if best < len(rooms) else capacity
        rows += room == capacity
        bisect.insort(rooms, room - length)
    return rows


def checked_pack(lengths, capacity, seed=None):
    """Pack these lengths; checks that every sample is in exactly one row, and that no row is empty or too long."""
    packs = packing.pack(lengths, capacity, seed)
    assert sorted(packs.order.tolist()) == list(range(len(lengths)))
    assert packs.starts[0] == 0
    assert packs.starts[-1] == len(lengths)
    assert (np.diff(packs.starts) > 0).all()
    assert packs.sums(lengths).max(initial=0) <= capacity
    return packs


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_packing_needs_as_few_rows_as_the_textbook_algorithm(distribution) -> None:
    lengths, capacity = draw_lengths(distribution, 30_000)
    packs = checked_pack(lengths, capacity)
    assert len(packs) == slow_best_fit_decreasing(lengths, capacity)
    assert lengths.sum() / (len(packs) * capacity) >= 0.998


@pytest.mark.parametrize("seed", range(20))
def test_small_inputs_need_as_few_rows_as_the_textbook_algorithm(seed) -> None:
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 60))
    lengths = random.integers(1, random.integers(1, capacity + 1), size=random.integers(1, 300), endpoint=True)
    assert len(checked_pack(lengths, capacity)) == slow_best_fit_decreasing(lengths, capacity)


def test_lengths_above_16_bits_are_packed() -> None:
    lengths = np.random.default_rng(0).integers(1, 131_073, size=2000)
    packs = checked_pack(lengths, 131_072)
    assert len(packs) == slow_best_fit_decreasing(lengths, 131_072)
    first = lengths[packs.order[packs.starts[:-1]]]
    assert (np.diff(first) <= 0).all(), "new rows begin with ever shorter samples"


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [([], 8, 0), ([3], 8, 1), ([8] * 5, 8, 5), ([3] * 7, 8, 4), ([1] * 16, 8, 2), ([5, 3, 4, 4], 8, 2), ([1], 1, 1)],
)
def test_edge_cases(lengths, capacity, rows) -> None:
    assert len(checked_pack(np.array(lengths, dtype=np.int64), capacity)) == rows


def test_packing_is_deterministic_and_a_seed_changes_which_samples_share_a_row() -> None:
    lengths, capacity = draw_lengths("mean 643", 5000)
    plain, again = packing.pack(lengths, capacity), packing.pack(lengths.astype(np.int32), capacity)
    one, other = checked_pack(lengths, capacity, seed=1), checked_pack(lengths, capacity, seed=2)
    assert np.array_equal(plain.order, again.order)
    assert np.array_equal(one.order, packing.pack(lengths, capacity, seed=1).order)
    assert not np.array_equal(one.order, other.order)
    assert len(plain) == len(one) == len(other)


def test_a_row_lists_its_samples_longest_first() -> None:
    packs = packing.pack(np.array([2, 5, 1, 3]), 8)
    assert [packs.row(number).tolist() for number in range(len(packs))] == [[1, 3], [0, 2]]


def test_the_cost_of_a_row_is_the_sum_of_its_samples() -> None:
    packs = packing.pack(np.array([2, 5, 1, 3]), 8)
    assert packs.sums(packing.attention_cost(np.array([2, 5, 1, 3]), 10)).tolist() == [11.4, 3.5]


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 9, 0], 8, "sample 1: its length of 9 .* capacity=8"),
        ([3, 0, 9], 8, "sample 1: its length of 0 .* shorter"),
        ([3.0], 8, "whole number"),
        ([[3]], 8, "whole number"),
        ([3], 0, "capacity=0"),
    ],
)
def test_invalid_lengths_are_refused(lengths, capacity, message) -> None:
    with pytest.raises(ValueError, match=message):
        packing.pack(np.array(lengths), capacity)


def test_cost_is_linear_for_short_samples_and_double_at_the_factor() -> None:
    cost = packing.attention_cost(np.array([1, 1000]), 1000)
    assert cost.tolist() == [1.001, 2000.0]
    with pytest.raises(ValueError, match="hidden_factor=0"):
        packing.attention_cost(np.array([1]), 0)
