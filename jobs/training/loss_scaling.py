"""Loss scaling for fp16 with FSDP: multiplies the loss by a factor, so that fp16 does not round small gradients to zero.

The factor is halved after a step with an overflow and doubled after many steps without one. The gradient norm, which all ranks
compute together anyway, tells whether there was an overflow, so all ranks decide alike. DeepSpeed has loss scaling of its own
for ZeRO. Why torch.amp.GradScaler is not used: docs/decisions.md, "Our own loss scaling".
"""

from typing import Any

import torch

INITIAL, GROWTH, PATIENCE = 2.0**16, 2.0, 1000
"""The first scale, the factor by which it changes, and the number of good steps in a row before it grows. As in
torch.amp.GradScaler and DeepSpeed, the scale is halved after a step with an overflow."""


def install(optimizer: Any) -> None:
    """Enable loss scaling: keep the scale and the number of good steps in the optimizer's parameter groups."""
    for group in optimizer.param_groups:
        group |= {"loss_scale": INITIAL, "good_steps": 0}


def state(optimizer: Any) -> dict[str, Any]:
    """What a checkpoint stores of the scale; empty without loss scaling."""
    group = optimizer.param_groups[0]
    return {name: group[name] for name in ("loss_scale", "good_steps") if name in group}


def restore(optimizer: Any, state: dict[str, Any]) -> None:
    """Set what `state` returned, from a checkpoint."""
    for group in optimizer.param_groups:
        group |= state


def scale(optimizer: Any) -> float:
    """The factor for the loss; 1 without loss scaling."""
    return float(optimizer.param_groups[0].get("loss_scale", 1.0))


def unscale(optimizer: Any) -> None:
    """Divide the gradients by the scale, in place."""
    if (factor := scale(optimizer)) != 1.0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / factor)


def update(optimizer: Any, norm: torch.Tensor | float) -> bool:
    """Adjust the scale after backward. Returns whether the optimizer may take this step: False after an overflow.

    `norm` is the norm of the unscaled gradients over all ranks.
    """
    if "loss_scale" not in optimizer.param_groups[0]:
        return True
    is_finite = bool(torch.isfinite(torch.as_tensor(norm)))
    for group in optimizer.param_groups:
        group["good_steps"] = group["good_steps"] + 1 if is_finite else 0
        if not is_finite:
            group["loss_scale"] = max(1.0, group["loss_scale"] / GROWTH)
        elif group["good_steps"] == PATIENCE:
            group["loss_scale"], group["good_steps"] = group["loss_scale"] * GROWTH, 0
    return is_finite
