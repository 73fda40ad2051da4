"""Which parameters decay, and the learning rate of each."""

import sys

import pytest
import torch
from torch import nn

from conf.errors import ConfigError
from jobs.model import build as model
from jobs.model import trained_weights
from jobs.training import optimizer as optim
from tests.conftest import Compose


def test_only_matrices_decay(compose: Compose) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    groups = optim.build(model, compose("train.weight_decay=0.1")).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 3)]


def test_frozen_parameters_are_left_out(compose: Compose) -> None:
    model = nn.Linear(2, 3)
    model.bias.requires_grad = False
    assert [len(group["params"]) for group in optim.build(model, compose()).param_groups] == [1]


def test_weights_with_a_peak_of_their_own(compose: Compose) -> None:
    words = [
        "train.learning_rate=1e-3",
        "+train.learning_rates={embed: 1e-5, layers.1: 2e-3}",
        "train.unfrozen=[embed,layers]",
    ]
    config = compose(*words)
    network = model.build(config)
    trained_weights.freeze_others(network, config.train.unfrozen)
    optimizer = optim.build(network, config)
    optim.set_learning_rate(optimizer, 5e-4)  # half of the peak
    rates = {id(item): group["lr"] for group in optimizer.param_groups for item in group["params"]}
    for name, parameter in network.named_parameters():
        expected = 5e-6 if "embed" in name else 1e-3 if ".layers.1." in name else 5e-4 if ".layers." in name else None
        assert rates.get(id(parameter)) == (None if expected is None else pytest.approx(expected)), name


@pytest.mark.parametrize("key", ["train.unfrozen", "train.learning_rates"])
def test_a_pattern_that_no_name_has_is_refused(key: str, compose: Compose) -> None:
    config = compose("+train.learning_rates={wte: 1}" if "rates" in key else f"{key}=[wte]")
    with pytest.raises(ConfigError, match=f"^{key}=wte: is found in no name of a trained weight"):
        network = model.build(config)
        trained_weights.freeze_others(network, config.train.unfrozen)
        optim.build(network, config)


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    weight = nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "peak_ratio": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(1.0), foreach=False)
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
