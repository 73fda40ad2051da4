"""At which steps training evaluates and saves."""

import pytest

from conf import schedule
from conf.schema_training import Train


def due(interval: schedule.Interval, steps: int) -> list[int]:
    return [step for step in range(steps + 1) if interval.is_due(step)]


@pytest.mark.parametrize(
    ("train", "rows", "expected"),
    [
        (Train(eval_every=4), 100, [4, 8, 12, 16, 20]),
        (Train(eval_every=0), 100, []),
        (Train(evals_per_epoch=1, global_batch=10), 100, [10, 20]),
        (Train(evals_per_epoch=4, global_batch=10), 100, [3, 5, 8, 10, 13, 15, 18, 20]),
        (Train(evals_per_epoch=2, global_batch=10), 95, [5, 10, 15, 19]),  # an epoch of 9.5 steps
        (Train(evals_per_epoch=3, global_batch=200), 100, list(range(1, 21))),  # an epoch of half a step
        (Train(), 100, []),  # every 100 steps
    ],
)
def test_evaluations_are_spread_evenly_over_an_epoch(train: Train, rows: int, expected: list[int]) -> None:
    assert due(schedule.evaluations(train, rows), 20) == expected


def test_the_default_intervals() -> None:
    assert due(schedule.evaluations(Train(), 9), 300) == [100, 200, 300]
    assert due(schedule.saves(Train(), 9), 1000) == [500, 1000]
