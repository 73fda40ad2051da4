"""The learning rate schedule, and which parameters decay."""

import sys

import pytest
import torch
from torch import nn

from conf.errors import ConfigError
from jobs.model import build as model
from jobs.training import lr_schedule
from jobs.training import optimizer as optim
from tests.conftest import Compose


def test_warmup_is_linear_and_ends_at_the_peak(compose: Compose) -> None:
    config = compose("train.learning_rate=1.0", "train.warmup_steps=4")
    assert [lr_schedule.learning_rate(step, 100, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_schedule.learning_rate(4, 100, config) == 1.0


def test_the_cosine_ends_at_the_floor(compose: Compose) -> None:
    config = compose("train.learning_rate=1.0", "train.warmup_steps=0", "train.min_lr_ratio=0.1")
    assert lr_schedule.learning_rate(50, 100, config) == pytest.approx(0.55)
    assert lr_schedule.learning_rate(100, 100, config) == pytest.approx(0.1)


def test_only_matrices_decay(compose: Compose) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    groups = optim.build(model, compose("train.weight_decay=0.1")).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_frozen_parameters_are_left_out(compose: Compose) -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad = False
    assert [len(group["params"]) for group in optim.build(model, compose()).param_groups] == [1]


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=torch.tensor(1.0), foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    optim.set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25


def test_muon_takes_matrices_of_blocks_and_adamw_the_rest(compose: Compose) -> None:
    config = compose("train.optimizer=muon", "train.weight_decay=0.1")
    network = model.build(config)
    muon, adam = optim.build(network, config)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    hidden = {names[id(item)] for group in muon.param_groups for item in group["params"]}
    others = {names[id(item)] for group in adam.param_groups for item in group["params"]}
    assert all(".layers." in name and name.endswith("proj.weight") for name in hidden)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= others
    assert hidden | others == set(names.values()) and not hidden & others


@pytest.mark.parametrize(("kind", "package", "overrides"), [("adamw_8bit", "torchao", ["parallel=fsdp"])])
def test_a_package_that_is_missing_is_named(
    kind, package, overrides, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(ConfigError, match=f"train.optimizer={kind}: needs {package}.*parallel=zero2"):
        optim.build(nn.Linear(2, 2), compose(f"train.optimizer={kind}", *overrides))
