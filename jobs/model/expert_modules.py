"""Finds the modules of mixtures of experts that call a module once for each expert that gets a token."""

from torch import nn


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that call other modules as often as the tokens ask for: an `experts` with modules inside, or the owner of a list.

    Most families keep the matrices of all experts in one module, which is called once. DBRX, and models with Python code of their
    own, call a module for each expert.
    """
    found = []
    for owner in model.modules():
        experts = getattr(owner, "experts", None)
        if hasattr(experts, "get_base_layer"):  # an adapter of PEFT on the matrices of all experts
            continue
        if not isinstance(experts, nn.Module) or not any(_has_weights(child) for child in experts.children()):
            continue
        found.append(owner if isinstance(experts, nn.ModuleList | nn.ModuleDict) else experts)
    return found


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
