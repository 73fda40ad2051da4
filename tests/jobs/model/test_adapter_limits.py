"""Ranks and alphas by pattern, and adapters in some blocks only: the same adapters as PEFT's own settings make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from conf.errors import ConfigError
from jobs.model import build
from launcher.estimate import parameters
from tests.conftest import Compose, put
from tests.jobs.model.test_adapters import on, untrained

__all__ = ["untrained"]
PEFT_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: list[dict[str, Any]] = [
    {"rank_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 5, r"layers\.[12]\.mlp\.up_proj": 2}},
    {"alpha_pattern": {"up_proj": 7.0, "^model.layers.1.self_attn.k_proj": 2.0}, "rank_pattern": {"k_proj": 2}},
    {"layers_to_transform": [1, 3], "alpha_pattern": {"layers.3.mlp.up_proj": 4.0}},
    {"layers_to_transform": [0], "targets": ["q_proj", "down_proj"]},
]


def adapters_of(model: Any) -> dict[str, tuple[float, list[tuple[int, ...]]]]:
    """Name of each adapted layer -> its scale, and the shapes of its matrices."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name: (
            layer.scaling["default"],
            [tuple(value.shape) for key, value in layer.named_parameters() if "lora_" in key],
        )
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("values", CASES, ids=lambda values: " ".join(values))
def test_the_adapters_are_those_of_peft(compose: Compose, untrained: Path, values: dict[str, Any]) -> None:
    words = ["cluster.train.gpus_per_node=0", "train.precision=fp32"]
    config = put(
        on(untrained, compose, "adapter=lora", *words), {f"adapter.{key}": item for key, item in values.items()}
    )
    ours = build.build_on_meta(config)
    options: dict[str, Any] = {"target_modules": PEFT_ALL} | values
    options["target_modules"] = options.pop("targets", options["target_modules"])
    base = build.build_on_meta(config, adapters=False)
    theirs = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", **options))
    assert adapters_of(ours) == adapters_of(theirs)
    counts = parameters.count(config.model.architecture, config.adapter)
    assert counts and counts.trained == sum(item.numel() for item in theirs.parameters() if item.requires_grad)
    assert counts.trained_block == max(
        sum(item.numel() for item in block.parameters() if item.requires_grad) for block in build.blocks(theirs)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_to_transform": [4]}, "adapter.layers_to_transform=4: the model has blocks 0 to 3"),
        ({"rank_pattern": {"c_attn": 4}}, "adapter.rank_pattern=c_attn: matches no layer with an adapter; one is model.layers.0"),
        ({"alpha_pattern": {"lm_head": 4.0}}, "adapter.alpha_pattern=lm_head: matches no layer"),
        ({"layers_to_transform": [1], "targets": ["q_proj", "lm_head"]}, "adapter.targets=lm_head: lm_head is in none"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_named(compose: Compose, untrained: Path, values: dict[str, Any], message: str) -> None:
    config = put(on(untrained, compose, "adapter=lora"), {f"adapter.{key}": item for key, item in values.items()})
    with pytest.raises(ConfigError) as caught, torch.device("cpu"):
        build.build_on_meta(config)
    assert str(caught.value).startswith(message)
