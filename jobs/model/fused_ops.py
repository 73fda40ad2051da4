"""Compiles the element-wise operations of a decoder block: its norms, and the gated activation of its MLP.

This is for models whose blocks cannot be compiled whole (adapters under ZeRO-3). Each operation becomes one or two kernels, and
backward keeps only its inputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from jobs.model import known_architectures
from jobs.model.unwrap import stubbed_forwards

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def fuse(block: nn.Module, compiled: Compile) -> int:
    """Apply `compiled` to the forward of each norm and to the gated activation of each MLP in `block`; returns how many.

    Forwards are replaced, not modules. So ZeRO-3's hooks, which gather a module's weights, stay outside the compiled code.
    ZeRO-3 also hooks activation modules, which have no weights. If that hook were compiled too, the code would be compiled again
    for every block, until the compiler reaches its limit of recompilations. So the forward of the activation is called, not the
    module.
    """
    norms = [module for module in block.modules() if type(module).__name__.endswith("Norm")]
    mlps = [module for module in block.modules() if _is_gated_mlp(module)]
    for norm in norms:
        norm.forward = compiled(norm.forward)
    for mlp in mlps:
        mlp.forward = _mlp_forward(mlp, compiled(_gated_activation(mlp.act_fn)))
    return len(norms) + len(mlps)


def _gated_activation(activation: Any) -> Callable[..., torch.Tensor]:
    forward: Callable[[torch.Tensor], torch.Tensor] = getattr(activation, "forward", activation)

    def gated_activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return forward(gate) * up

    return gated_activation


def _mlp_forward(mlp: Any, gated_activation: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def forward(x: torch.Tensor) -> Any:
        return mlp.down_proj(gated_activation(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward


def _is_gated_mlp(module: Any) -> bool:
    """Whether the module computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing else."""
    activation = getattr(module, "act_fn", None)
    if not callable(activation) or not all(isinstance(getattr(module, name, None), nn.Module) for name in PROJECTIONS):
        return False
    if isinstance(activation, nn.Module) and list(activation.parameters()):
        return False  # under ZeRO-3 its parameters need the hooks that a call of its forward skips
    known = known_architectures.is_gated_mlp(module)
    return _computes_gated_mlp(module) if known is None else known


def _computes_gated_mlp(mlp: Any) -> bool:
    """Run the module's own code with stubs for its projections, and compare the result with the formula."""
    x, gate, up, down = torch.randn(4, 1, 2, 8).unbind()
    down_inputs: list[torch.Tensor] = []

    def down_proj(product: torch.Tensor) -> torch.Tensor:
        down_inputs.append(product)
        return down

    stubs = {mlp.gate_proj: lambda _: gate, mlp.up_proj: lambda _: up, mlp.down_proj: down_proj}
    try:
        with stubbed_forwards(stubs):
            out = mlp.forward(x)
    except Exception:  # a model may bring any code; one that fails here is left as it is
        return False
    return out is down and len(down_inputs) == 1 and torch.equal(down_inputs[0], mlp.act_fn(gate) * up)
