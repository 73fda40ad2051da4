"""The learning rate of each step against the schedulers of transformers and torch."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR
from transformers import optimization

from jobs.training import lr_schedule
from tests.conftest import Compose

STEPS, WARMUP, PEAK = 60, 12, 3e-4
SCHEDULES = {
    "cosine": (optimization.get_cosine_schedule_with_warmup, {}, []),
    "linear": (optimization.get_linear_schedule_with_warmup, {}, []),
    "constant_with_warmup": (optimization.get_constant_schedule_with_warmup, {}, []),
    "inverse_sqrt": (optimization.get_inverse_sqrt_schedule, {}, []),
    "polynomial": (
        optimization.get_polynomial_decay_schedule_with_warmup,
        {"power": 2.0, "lr_end": 0.2 * PEAK},
        ["train.lr_power=2", "train.min_lr_ratio=0.2"],
    ),
    "cosine_restarts": (
        optimization.get_cosine_with_hard_restarts_schedule_with_warmup, {"num_cycles": 3}, ["train.lr_cycles=3"],
    ),
    "wsd": (
        optimization.get_wsd_schedule,
        {"num_decay_steps": 15, "min_lr_ratio": 0.2},
        ["train.decay_ratio=0.25", "train.min_lr_ratio=0.2"],
    ),
    "cosine to a floor": (
        optimization.get_cosine_with_min_lr_schedule_with_warmup,
        {"min_lr_rate": 0.1},
        ["train.lr_schedule=cosine", "train.min_lr_ratio=0.1"],
    ),
}  # fmt: skip


def rates(compose: Compose, *words: str) -> list[float]:
    config = compose(f"train.learning_rate={PEAK}", *words)
    return [lr_schedule.learning_rate(step, STEPS, config) for step in range(STEPS)]


def scheduled(make) -> list[float]:
    """The rates that a scheduler of torch gives an optimizer, step by step."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, values = make(optimizer), []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_those_of_transformers(name: str, compose: Compose) -> None:
    make, options, words = SCHEDULES[name]
    length = {} if name in ("constant_with_warmup", "inverse_sqrt") else {"num_training_steps": STEPS}
    expected = scheduled(lambda optimizer: make(optimizer, num_warmup_steps=WARMUP, **length, **options))
    floor = [] if "train.min_lr_ratio" in str(words) else ["train.min_lr_ratio=0"]
    named = [] if "lr_schedule" in str(words) else [f"train.lr_schedule={name}"]
    actual = rates(compose, f"train.warmup_steps={WARMUP}", *named, *floor, *words)
    assert actual[WARMUP:] == pytest.approx(expected[WARMUP:], abs=1e-6 * PEAK)
    warmup = scheduled(lambda optimizer: LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP - 1))
    assert actual[:WARMUP] == pytest.approx(warmup[:WARMUP], rel=1e-9)
    assert (
        actual[: WARMUP - 1] == pytest.approx(expected[1:WARMUP], rel=1e-9) or name == "wsd"
    )  # a Trainer's, one step later


def test_a_constant_rate_has_no_warmup(compose: Compose) -> None:
    assert rates(compose, "train.lr_schedule=constant") == [PEAK] * STEPS


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], 6),  # the default: a tenth of the training, at most 10 steps
        (["train.warmup_ratio=0.25"], 15),
        (["train.warmup_steps=7"], 7),
        (["train.warmup_steps=0"], 0),
    ],
)
def test_steps_of_the_warmup(words: list[str], steps: int, compose: Compose) -> None:
    values = rates(compose, "train.lr_schedule=constant_with_warmup", *words)
    assert [value < PEAK for value in values] == [True] * max(0, steps - 1) + [False] * (STEPS - max(0, steps - 1))
