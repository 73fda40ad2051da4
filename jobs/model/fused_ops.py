"""The element-wise parts of a decoder block: its norms, and the product with a gate. Each is compiled to a kernel or two where
the block cannot be as a whole, and then keeps only what goes in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from jobs.model.unwrap import stubbed_forwards

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def fuse(block: nn.Module, compiled: Compile) -> int:
    """Put `compiled` around the forward of each norm and each gated product of `block`; returns how many there were.

    Forwards, not modules: ZeRO-3's hooks, which gather what a module needs, stay outside. It hooks an activation, too, which
    needs nothing; compiled along, that hook would be cut out of every block's code anew, until the compiler gives up.
    """
    norms = [module for module in block.modules() if type(module).__name__.endswith("Norm")]
    gated = [module for module in block.modules() if _is_gated(module)]
    for norm in norms:
        norm.forward = compiled(norm.forward)  # type: ignore[method-assign]
    for mlp in gated:
        mlp.forward = _through(mlp, compiled(_product(getattr(mlp.act_fn, "forward", mlp.act_fn))))
    return len(norms) + len(gated)


def _product(act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return act(gate) * up

    return product


def _through(mlp: Any, product: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def forward(x: torch.Tensor) -> Any:
        return mlp.down_proj(product(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward


def _is_gated(mlp: Any) -> bool:
    """Whether it computes down(act(gate(x)) * up(x)) and nothing else: tried on the model's own code, without weights."""
    gate_proj, up_proj, down_proj = projections = [getattr(mlp, name, None) for name in PROJECTIONS]
    act = getattr(mlp, "act_fn", None)
    if not callable(act) or not all(isinstance(item, nn.Module) for item in projections):
        return False
    if isinstance(act, nn.Module) and list(act.parameters()):
        return False
    given, gate, up, down = torch.randn(4, 1, 2, 8)
    seen: list[torch.Tensor] = []

    def stub(product: torch.Tensor) -> torch.Tensor:
        seen.append(product)
        return down

    try:
        with stubbed_forwards({gate_proj: lambda _: gate, up_proj: lambda _: up, down_proj: stub}):
            found = mlp.forward(given)
    except Exception:  # of whatever code a model brings: it is then left as it is
        return False
    return found is down and len(seen) == 1 and torch.equal(seen[0], mlp.act_fn(gate) * up)
