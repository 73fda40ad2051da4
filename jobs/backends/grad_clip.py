"""Gradient clipping by global norm, over sharded and tensor-parallel gradients."""

import torch
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from jobs.backends.tensor_parallel import MESH_DIM, local_tensor


def clip(parameters: list[nn.Parameter], limit: float, parts: list[nn.Module], mesh: DeviceMesh) -> torch.Tensor:
    """Scale gradients in place to a global norm of at most `limit` (0: no limit), and return the norm before, a scalar tensor.

    Does what torch's `clip_grad_norm_` does, but for parameters on several meshes. `parts` are modules with whole weights that see
    only this rank's heads; their gradients are summed over the tensor-parallel `mesh` first.
    """
    for module in parts:
        for parameter in module.parameters():
            if parameter.grad is not None:
                grad = local_tensor(parameter.grad)
                grad.copy_(all_reduce(grad, "sum", mesh))
    limit = limit or float("inf")
    if mesh.size() == 1:
        norm: torch.Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    grads = [parameter.grad for parameter in parameters if isinstance(parameter.grad, DTensor)]
    # Sum of squares: over the shards for all, and also over the tensor ranks for matrices that are sliced
    whole = [local_tensor(grad) for grad in grads if MESH_DIM not in (grad.device_mesh.mesh_dim_names or ())]
    sliced = [local_tensor(grad) for grad in grads if MESH_DIM in (grad.device_mesh.mesh_dim_names or ())]
    squares = torch.stack([torch.nn.utils.get_total_norm(group).float().square() for group in (whole, sliced)])
    squares = all_reduce(squares.to(grads[0].device), "sum", grads[0].device_mesh["shard"])
    squares = torch.stack([squares[0], all_reduce(squares[1], "sum", mesh)])
    # "max" makes it equal to the last bit on all tensor ranks; else whole weights would drift apart
    norm = all_reduce(squares.sum().sqrt(), "max", mesh)
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(whole + sliced, factor.to(whole[0].device))
    return norm
