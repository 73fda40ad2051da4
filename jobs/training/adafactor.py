"""Adafactor on sharded weights: torch's own, whose in-place steps DTensors refuse (2.13), with the same numbers."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate


class Adafactor(torch.optim.Adafactor):
    """Shazeer and Stern 2018 (arXiv 1804.04235) as in torch.optim: a row and a column of second moments a matrix.

    Rows are sharded like the weight, columns are whole on every rank; a test holds it against torch's on plain tensors.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, self.state[parameter])

    @staticmethod
    def _update(parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
        squared = grad * grad
        means = (
            {"row_var": _whole(squared.mean(-1, keepdim=True)), "col_var": _whole(squared.mean(-2, keepdim=True))}
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
        size = max(eps2, _rms(parameter)) * min(group["lr"], step**-0.5)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if grad.dim() > 1:
            row = state["row_var"]
            variance = row * state["col_var"] / _whole(row.mean(-2, keepdim=True)).clamp(min=eps1)
        else:
            variance = state["variance"]
        update = grad * variance.clamp(min=eps1 * eps1).rsqrt()
        parameter.add_(update, alpha=-size / max(1.0, _rms(update) / group["d"]))


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Sums that are spread over ranks, brought together; what is sharded stays so."""
    if not isinstance(value, DTensor):
        return value
    return value.redistribute(placements=[Replicate() if item.is_partial() else item for item in value.placements])


def _rms(value: torch.Tensor) -> float:
    found = value.norm(2)
    return float(found.full_tensor() if isinstance(found, DTensor) else found) / value.numel() ** 0.5
