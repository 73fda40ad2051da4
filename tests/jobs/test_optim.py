"""The learning rate schedule, and which parameters decay."""

import pytest
from torch import nn

from jobs import optim


def test_warmup_is_linear_and_ends_at_the_peak(compose):
    config = compose("train.learning_rate=1.0", "train.warmup_steps=4")
    assert [optim.learning_rate(step, 100, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert optim.learning_rate(4, 100, config) == 1.0


def test_the_cosine_ends_at_the_floor(compose):
    config = compose("train.learning_rate=1.0", "train.warmup_steps=0", "train.min_lr_ratio=0.1")
    assert optim.learning_rate(50, 100, config) == pytest.approx(0.55)
    assert optim.learning_rate(100, 100, config) == pytest.approx(0.1)


def test_only_matrices_decay(compose):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    groups = optim.build(model, compose("train.weight_decay=0.1")).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_frozen_parameters_are_left_out(compose):
    model = nn.Linear(2, 3)
    model.bias.requires_grad = False
    assert [len(group["params"]) for group in optim.build(model, compose()).param_groups] == [1]
