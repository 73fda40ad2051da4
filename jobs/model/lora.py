"""Adds LoRA adapters (PEFT) to a model."""

from typing import Any

from transformers import (
    PreTrainedModel,
)

from conf.errors import ConfigError, Problem, first_line
from conf.schema import Config


def add_lora(config: Config, model: PreTrainedModel) -> Any:
    """The model with a PEFT LoRA: fp32 adapters on a frozen base.

    Raises ConfigError for targets that are not there, or that DoRA has no norms for.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear, LoraLayer

    adapter = config.adapter
    targets = "all-linear" if adapter.targets == ["all-linear"] else list(adapter.targets)
    plan = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
    )
    try:
        wrapped = get_peft_model(model, plan)
    except ValueError as error:
        raise ConfigError(Problem("adapter.targets", adapter.targets, first_line(error))) from error
    layers = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)}
    other = [name for name, layer in layers.items() if not isinstance(layer, Linear) or layer.fan_in_fan_out]
    if adapter.dora and other:
        raise ConfigError(
            Problem("adapter.dora", True, f"is for linear layers, and {other[0]} is none: set it to false")
        )
    return wrapped
