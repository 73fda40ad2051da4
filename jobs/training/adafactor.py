"""Adafactor for sharded weights, with the same numbers as torch.optim.Adafactor.

The step of torch's own uses in-place operations that DTensor refuses (torch 2.13).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate


class Adafactor(torch.optim.Adafactor):
    """Shazeer and Stern 2018 (arXiv 1804.04235), as in torch.optim: per matrix, one row and one column of second moments.

    Row moments are sharded like the weight; column moments are whole on every rank. A test compares it with torch's on plain
    tensors.
    """

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step. `closure` is for the signature only; it is not called."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, parameter.grad, group, self.state[parameter])

    @staticmethod
    def _update(parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
        squared = grad * grad
        # Names and shapes of the state are those of torch.optim.Adafactor.
        means = (
            {"row_var": _reduced(squared.mean(-1, keepdim=True)), "col_var": _reduced(squared.mean(-2, keepdim=True))}
            if grad.dim() > 1
            else {"variance": squared}
        )
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(mean) for name, mean in means.items()}
        state["step"] += 1
        step = float(state["step"])
        for name, mean in means.items():
            state[name].lerp_(mean, step ** group["beta2_decay"])
        step_size = max(eps2, _rms(parameter)) * min(group["lr"], step**-0.5)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if grad.dim() > 1:
            row_var = state["row_var"]
            variance = row_var * state["col_var"] / _reduced(row_var.mean(-2, keepdim=True)).clamp(min=eps1)
        else:
            variance = state["variance"]
        update = grad * variance.clamp(min=eps1 * eps1).rsqrt()
        parameter.add_(update, alpha=-step_size / max(1.0, _rms(update) / group["d"]))


def _reduced(value: torch.Tensor) -> torch.Tensor:
    """Add up a DTensor's partial sums over the ranks that hold them. Sharded dimensions stay sharded."""
    if not isinstance(value, DTensor):
        return value
    return value.redistribute(placements=[Replicate() if item.is_partial() else item for item in value.placements])


def _rms(value: torch.Tensor) -> float:
    """Root mean square over the whole tensor, all ranks' shards included."""
    norm = value.norm(2)
    whole_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return whole_norm / float(value.numel() ** 0.5)
