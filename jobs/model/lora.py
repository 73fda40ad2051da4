"""Adds LoRA adapters (PEFT) to a model."""

import re
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from conf.errors import ConfigError, Problem, first_line
from conf.families import NO_DORA, NO_DROPOUT
from conf.schema import Config
from jobs.distributed.log_once import log_once
from jobs.model import adapter_limits, saved_modules, shared_layers, uncalled_layers


def add_lora(config: Config, model: PreTrainedModel) -> Any:
    """Return the model in PEFT's wrapper: fp32 adapters on a frozen base.

    Raises ConfigError if `adapter.targets` names layers that do not exist, or if DoRA would adapt a layer that is not linear.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import Linear, LoraLayer

    adapter = config.adapter
    parameters = _targeted_parameters(model, adapter.targets)
    modules = [name for name in adapter.targets if name not in parameters]
    lora_config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type] # PEFT declares int, and divides whatever it gets
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        target_parameters=parameters or None,
        exclude_modules=[*_not_adaptable(config, model, modules), *adapter_limits.outside_layers(model, adapter)]
        or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
    )
    adapter_limits.require_layers(config, model)
    saved_modules.check(config, model)
    try:
        with warnings.catch_warnings():
            # the merge writes tied weights apart, where PEFT's own adds one update to both
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="The following .*_pattern keys")  # an error, see adapter_limits
            wrapped = get_peft_model(model, lora_config)
    except ValueError as error:
        raise ConfigError(_problem(config, first_line(error))) from error
    layers = {name: layer for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)}
    not_linear = [name for name, layer in layers.items() if not isinstance(layer, Linear) or layer.fan_in_fan_out]
    if adapter.dora and not_linear:
        message = f"DoRA adapts linear layers only, and {not_linear[0]} is not one: set adapter.dora=false"
        raise ConfigError(Problem("adapter.dora", True, message))
    adapter_limits.check(config, list(layers))
    saved_modules.to_fp32(wrapped)
    _log_experts(wrapped, len(layers), adapter.targets)
    if modules == ["all-linear"]:
        _log_left_out(wrapped, lora_config.exclude_modules or ())
    return wrapped


def _targeted_parameters(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """The targets that name a weight of a module, not a module: the matrices of all experts in one (`experts.down_proj`)."""
    modules = [name for name, _ in model.named_modules()]
    weights = [name for name, weight in model.named_parameters() if weight.ndim in (2, 3)]
    return [
        item for item in targets if adapter_limits.ends_in(weights, item) and not adapter_limits.ends_in(modules, item)
    ]


def _not_adaptable(config: Config, model: PreTrainedModel, modules: list[str]) -> list[str]:
    """Linear layers where an adapter would break the model, have no effect, or could not be merged.

    These are the routers of Llama 4 and Phi MoE, which return a tuple, and those of `uncalled_layers` and `shared_layers`.
    Raises ConfigError if `adapter.targets` names one.
    """
    own = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not _returns_tensor(module)
    ]
    uncalled, shared = uncalled_layers.find(model), shared_layers.find(model)
    if modules == ["all-linear"]:
        uncalled = [name for name in uncalled if isinstance(model.get_submodule(name), nn.Linear)]
        left_out = [*own, *uncalled, *shared]
        if left_out:
            kinds = sorted({".".join(name.split(".")[-2:]) for name in left_out})
            log_once(f"adapter: no adapter on {', '.join(kinds)}, which cannot have one")
        return left_out
    for target in modules:
        for found, what in (
            (own, "is a router"),
            (uncalled, "has a weight that the model reads without calling the layer"),
            ([] if config.consolidate.adapter_only else shared, "shares its weight with a layer of another block"),
        ):
            if name := next((name for name in found if adapter_limits.ends_in([name], target)), None):
                message = f"{name} {what}, so it cannot have an adapter: remove it from adapter.targets"
                raise ConfigError(Problem("adapter.targets", target, message))
    return []


def _returns_tensor(linear: nn.Linear) -> bool:
    """Whether the layer returns one tensor. Only a layer with a forward of its own is run to find out."""
    if type(linear).forward is nn.Linear.forward:
        return True
    rows = torch.zeros(2, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
    try:
        with torch.no_grad():
            return isinstance(linear(rows), torch.Tensor)
    except Exception:  # any code of a model, or a kernel that this device lacks: no router is known to raise here
        return True


def _problem(config: Config, reason: str) -> Problem:
    """The key that PEFT's error is about. PEFT cannot adapt the matrices of experts with dropout or DoRA."""
    adapter = config.adapter
    if "ParamWrapper" not in reason:
        return Problem("adapter.targets", adapter.targets, reason)
    if adapter.dropout:
        return Problem("adapter.dropout", adapter.dropout, NO_DROPOUT)
    return Problem("adapter.dora", adapter.dora, NO_DORA)


def _log_left_out(wrapped: Any, known: Collection[str]) -> None:
    """Say which linear layers PEFT's `all-linear` leaves out, besides the head and those that are `known`: shared experts."""
    from peft.tuners.lora import LoraLayer

    model = wrapped.get_base_model()
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    inside = {id(module) for layer in adapted for module in layer.modules()}
    left_out = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and module is not model.get_output_embeddings()
        if name not in known and not saved_modules.is_inside_wrapper(name)
    ]
    if left_out:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in left_out})
        log_once(
            f"adapter: all-linear leaves out {len(left_out)} linear layers, {', '.join(kinds)}; name layers in adapter.targets to "
            "train these too"
        )


def _log_experts(wrapped: Any, layers: int, targets: list[str]) -> None:
    """Say which matrices of experts stay frozen: PEFT's `all-linear` finds those of some model families only."""
    from peft.tuners.lora import ParamWrapper

    adapted = {
        (_without_base_layer(name), layer.parameter_name)
        for name, layer in wrapped.named_modules()
        if isinstance(layer, ParamWrapper)
    }
    frozen, adapts_experts = set(), any("expert" in name for name, _ in adapted)
    for name, weight in wrapped.named_parameters():
        module, _, parameter = name.rpartition(".")
        module = _without_base_layer(module)
        if _is_of_experts(wrapped, name, weight) and "lora_" not in name and (module, parameter) not in adapted:
            frozen.add(".".join([*module.split(".")[-2:], parameter]))
    if frozen:
        none = "" if adapts_experts else ", none of the experts"
        log_once(
            f"adapter: adapter.targets={','.join(targets)} adapts {layers} layers{none}. No adapter on the experts in "
            f"{', '.join(sorted(frozen))}; name them in adapter.targets to train them"
        )


def _is_of_experts(model: nn.Module, name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is that of all experts of a block: one with three dimensions, or one matrix below the other (DBRX)."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
        return False
    return weight.ndim == 3 or (weight.ndim == 2 and ".experts." in name and not name.endswith("bias"))


def _without_base_layer(name: str) -> str:
    """The name of the module inside PEFT's wrappers: `mlp.experts.base_layer` -> `mlp.experts`."""
    return re.sub(r"(\.base_layer)+$", "", name)
