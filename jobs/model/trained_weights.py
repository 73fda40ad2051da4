"""Freezes weights by their names, and gives weights a learning rate of their own by their names."""

import re

from torch import nn

from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.tensor_io.wrapper_names import without_wrappers


def freeze_others(model: nn.Module, patterns: list[str]) -> None:
    """Train only the weights in whose names a pattern is found. No pattern: change nothing.

    A tied weight has two names; it is trained if a pattern is found in one of them. Raises ConfigError for a pattern that is
    found in no name.
    """
    if not patterns:
        return
    named = [(without_wrappers(name), weight) for name, weight in model.named_parameters(remove_duplicate=False)]
    require_found(patterns, [name for name, _ in named], "train.unfrozen")
    trained = {id(weight) for name, weight in named if any(re.search(pattern, name) for pattern in patterns)}
    for _, weight in named:
        if id(weight) not in trained:
            weight.requires_grad = False


def peak_of(name: str, config: Config) -> tuple[int, float]:
    """The peak learning rate of a weight: that of the first pattern of `train.learning_rates` that is found in its name.

    Without one, the matrix B of an adapter has `adapter.lora_plus_ratio` times that of the others (LoRA+). Also returns which of
    these it is: the number of the pattern from 2, 1 for LoRA+, 0 for `train.learning_rate` itself.
    """
    train, ratio = config.train, config.adapter.lora_plus_ratio
    for number, (pattern, rate) in enumerate(train.learning_rates.items(), 2):
        if re.search(pattern, name):
            return number, rate
    if ratio is not None and ".lora_B." in name:
        return 1, train.learning_rate * ratio
    return 0, train.learning_rate


def require_found(patterns: list[str], names: list[str], key: str) -> None:
    """Raise ConfigError naming each pattern that is found in none of the names."""
    lost = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    if lost:
        message = f"is found in no name of a trained weight; names are, for example, {', '.join(_examples(names))}"
        raise ConfigError(*(Problem(key, pattern, message) for pattern in lost))


def _examples(names: list[str]) -> list[str]:
    return [names[0], names[len(names) // 2], names[-1]] if len(names) > 2 else names
