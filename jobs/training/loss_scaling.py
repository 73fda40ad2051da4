"""The loss scale of fp16: gradients that fp16 would round to 0 are kept by a factor, which follows what overflows.

DeepSpeed has its own. torch's GradScaler looks at each rank's gradients alone, so it cannot agree over FSDP2's shards; here the
gradient norm, which all ranks share anyway, says whether anything overflowed.
"""

from typing import Any

import torch

INITIAL, GROWTH, PATIENCE = 2.0**16, 2.0, 1000
"""As in torch.amp.GradScaler and DeepSpeed: doubled after so many good steps, halved after a bad one."""


def install(optimizer: Any) -> None:
    """Keep the scale in the optimizer's groups."""
    for group in optimizer.param_groups:
        group |= {"loss_scale": INITIAL, "good_steps": 0}


def state(optimizer: Any) -> dict[str, Any]:
    """What a checkpoint keeps of the scale; empty where there is none."""
    group = optimizer.param_groups[0]
    return {name: group[name] for name in ("loss_scale", "good_steps") if name in group}


def restore(optimizer: Any, state: dict[str, Any]) -> None:
    for group in optimizer.param_groups:
        group |= state


def scale(optimizer: Any) -> float:
    """1 where there is none."""
    return float(optimizer.param_groups[0].get("loss_scale", 1.0))


def unscale(optimizer: Any) -> None:
    """Divide the gradients by the scale."""
    if (factor := scale(optimizer)) != 1.0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / factor)


def update(optimizer: Any, norm: torch.Tensor | float) -> bool:
    """Whether this step, whose unscaled gradients have this norm, can be taken; the scale follows."""
    if "loss_scale" not in optimizer.param_groups[0]:
        return True
    good = bool(torch.isfinite(torch.as_tensor(norm)))
    for group in optimizer.param_groups:
        group["good_steps"] = group["good_steps"] + 1 if good else 0
        if not good:
            group["loss_scale"] = max(1.0, group["loss_scale"] / GROWTH)
        elif group["good_steps"] == PATIENCE:
            group["loss_scale"], group["good_steps"] = group["loss_scale"] * GROWTH, 0
    return good
