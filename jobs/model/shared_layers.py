"""Finds linear layers that share one weight: the blocks of Zamba repeat a layer."""

from collections import defaultdict

from torch import nn


def find(model: nn.Module) -> list[str]:
    """Names of linear layers whose weight is that of another linear layer too.

    Each would get an adapter of its own, and a merge could not add both to the one weight.
    """
    owners = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            owners[id(module.weight)].append(name)
    return [name for names in owners.values() if len(names) > 1 for name in names]
