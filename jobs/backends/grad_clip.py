"""Gradient clipping by global norm, over sharded and tensor-parallel gradients."""

import torch
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from jobs.backends.tensor_parallel import NAME, _local


def clip(parameters: list[nn.Parameter], limit: float, parts: list[nn.Module], mesh: DeviceMesh) -> torch.Tensor:
    """Scale gradients down to a global norm of `limit`, and return what it was, as `clip_grad_norm_` does; but of parameters
    on several meshes, once the gradients of `parts` are added up over `mesh`."""
    for module in parts:
        for parameter in module.parameters():
            if parameter.grad is not None:
                grad = _local(parameter.grad)
                grad.copy_(all_reduce(grad, "sum", mesh))
    limit = limit or float("inf")
    if mesh.size() == 1:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    grads = [parameter.grad for parameter in parameters if isinstance(parameter.grad, DTensor)]
    whole = [_local(grad) for grad in grads if NAME not in (grad.device_mesh.mesh_dim_names or ())]
    cut = [_local(grad) for grad in grads if NAME in (grad.device_mesh.mesh_dim_names or ())]
    squares = torch.stack([torch.nn.utils.get_total_norm(some).float().square() for some in (whole, cut)])
    squares = all_reduce(squares.to(grads[0].device), "sum", grads[0].device_mesh["shard"])
    squares = torch.stack([squares[0], all_reduce(squares[1], "sum", mesh)])
    norm = all_reduce(squares.sum().sqrt(), "max", mesh)  # to the last bit the same, or whole weights would drift apart
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(whole + cut, factor.to(whole[0].device))
    return norm
