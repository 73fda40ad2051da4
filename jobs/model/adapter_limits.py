"""Limits adapters to some decoder blocks, and finds patterns of ranks that match no layer."""

import re

from torch import nn
from transformers import PreTrainedModel

from conf.errors import ConfigError, Problem
from conf.schema import Config
from conf.schema_training import Adapter

KEY = "adapter.layers_to_transform"


def outside_layers(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Names of all modules with weights that lie outside of `adapter.layers_to_transform`. None if all layers get adapters.

    PEFT has such a setting, but not together with `all-linear`.
    """
    if not adapter.layers_to_transform:
        return []
    inside = tuple(f"{name}." for number, name in _numbered(model) if number in adapter.layers_to_transform)
    return [
        name
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]


def require_layers(config: Config, model: PreTrainedModel) -> None:
    """Raise ConfigError for a number in `adapter.layers_to_transform` that no decoder block has."""
    there = {number for number, _ in _numbered(model)}
    wrong = [number for number in config.adapter.layers_to_transform if number not in there]
    if wrong:
        message = f"the model has blocks {min(there)} to {max(there)}" if there else "the model has no numbered blocks"
        raise ConfigError(Problem(KEY, wrong[0], f"{message}. Use these numbers, or [] for all"))


def check(config: Config, adapted: list[str]) -> None:
    """Raise ConfigError for an adapter outside of the chosen blocks, and for patterns and targets that no adapted layer has.

    `adapted` are the names of the layers with an adapter.
    """
    adapter = config.adapter
    names = [name.removeprefix("base_model.model.") for name in adapted]
    if adapter.layers_to_transform:
        numbers = "|".join(map(str, adapter.layers_to_transform))
        if strays := [name for name in names if not re.search(rf"\.({numbers})\.", name)]:
            message = (
                f"PEFT cannot leave out {strays[0]}. Name layers without experts in adapter.targets, or set it to []"
            )
            raise ConfigError(Problem(KEY, _typed(adapter.layers_to_transform), message))
        lost = [target for target in adapter.targets if target != "all-linear" and not ends_in(names, target)]
        if lost:
            message = (
                f"{lost[0]} is in none of the blocks of {KEY}={_typed(adapter.layers_to_transform)}. Remove one of them"
            )
            raise ConfigError(Problem("adapter.targets", lost[0], message))
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                message = f"matches no layer with an adapter; one is {names[0]}. Use the end of such a name"
                raise ConfigError(Problem(f"adapter.{key}", pattern, message))


def _numbered(model: nn.Module) -> list[tuple[int, str]]:
    """(number, name) of each decoder block."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    named = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return [(int(name.rpartition(".")[2]), name) for name in named if name.rpartition(".")[2].isdigit()]


def ends_in(names: list[str], end: str) -> bool:
    return any(f".{name}".endswith(f".{end}") for name in names)


def _typed(numbers: list[int]) -> str:
    return f"[{','.join(map(str, numbers))}]"
