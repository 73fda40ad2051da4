"""jobs/data/splits.py: which samples are held out."""

import numpy as np
import pytest

from jobs.data.splits import TrainingSets, split_held_out


def sets(*rows: int) -> TrainingSets:
    """One sample for each number; equal numbers are equal rows."""
    hashes = np.asarray(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return TrainingSets(hashes, hashes, [0, len(rows)])


@pytest.mark.parametrize("fraction", [1e-30, 0.001, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_both_sides_have_a_row_and_equal_rows_are_on_one(fraction: float, seed: int) -> None:
    for count in (2, 3, 4, 7, 50):
        rows = np.repeat(np.arange(1, count + 1), 2)
        train, held_out = split_held_out(sets(*rows.tolist()), fraction, seed)
        assert sorted([*train, *held_out]) == list(range(2 * count))
        assert len(train)
        assert len(held_out)
        assert not set(rows[train]) & set(rows[held_out])


@pytest.mark.parametrize("rows", [[], [1], [1, 1], range(1, 200)])
def test_fraction_0_holds_out_nothing(rows: list[int]) -> None:
    train, held_out = split_held_out(sets(*rows), 0, 0)
    assert (len(train), len(held_out)) == (len(rows), 0)


def test_rows_that_are_all_equal_are_all_held_out() -> None:
    train, held_out = split_held_out(sets(5, 5, 5), 0.05, 0)
    assert (len(train), len(held_out)) == (0, 3)


def test_about_the_fraction_is_held_out() -> None:
    _, held_out = split_held_out(sets(*range(1, 10_001)), 0.05, 3)
    assert 400 < len(held_out) < 600
