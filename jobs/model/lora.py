"""Adds LoRA adapters (PEFT) to a model."""

from typing import Any

from transformers import PreTrainedModel

from conf.errors import ConfigError, Problem, first_line
from conf.schema import Config


def add_lora(config: Config, model: PreTrainedModel) -> Any:
    """Return the model in PEFT's wrapper: fp32 adapters on a frozen base.

    Raises ConfigError if `adapter.targets` names layers that do not exist, or if DoRA would adapt a layer that is not linear.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear, LoraLayer

    adapter = config.adapter
    targets = "all-linear" if adapter.targets == ["all-linear"] else list(adapter.targets)
    lora_config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type] # PEFT declares int, and divides whatever it gets
        lora_dropout=adapter.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
    )
    try:
        wrapped = get_peft_model(model, lora_config)
    except ValueError as error:
        raise ConfigError(Problem("adapter.targets", adapter.targets, first_line(error))) from error
    layers = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)}
    not_linear = [name for name, layer in layers.items() if not isinstance(layer, Linear) or layer.fan_in_fan_out]
    if adapter.dora and not_linear:
        message = f"DoRA adapts linear layers only, and {not_linear[0]} is not one: set adapter.dora=false"
        raise ConfigError(Problem("adapter.dora", True, message))
    return wrapped
