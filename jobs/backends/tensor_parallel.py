"""Tensor parallelism: neighbouring ranks each hold a slice of every matrix of a block, and add up what they computed.

Projections into heads or the inner width are cut by rows, those back by columns (Shoeybi 2019, "Megatron-LM"), as the model's
own plan says; so a block needs two sums over the ranks on the way forward and two on the way back. All else is whole on each.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from conf.errors import ConfigError, Problem
from jobs.model.unwrap import causal_lm

NAME = "tensor"
"""Of the mesh's dimension."""
STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")
"""Of transformers' plans: cut by rows of the weight, cut by its columns, or whole but seeing only some heads."""


def slice_matrices(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Cut the matrices of `model`, which has no weights yet, over `mesh`, before sharding.

    Returns the modules whose weights are whole but see this rank's heads only: `clip` adds up their gradients. Raises
    ConfigError for a model without a plan, with one of other kinds, or with dimensions that cannot be cut.
    """
    inside = causal_lm(model)
    plan = getattr(inside.config.get_text_config(), "base_model_tp_plan", None) or {}
    problems = [f"is no plan for {name}: {style}" for name, style in plan.items() if style not in STYLES]
    if not plan or problems:
        raise _refused(mesh, problems[0] if problems else f"a {type(inside).__name__} has no plan of that")
    parts: list[nn.Module] = []
    entered: set[nn.Module] = set()
    for name, module in inside.base_model.named_modules():
        style = next((style for pattern, style in plan.items() if _matches(pattern, name)), None)
        if style is None:
            continue
        if style == STYLES[2]:
            parts.append(module)
            continue
        _cut(name, module, 0 if style == "colwise" else 1, mesh)
        parent = inside.base_model.get_submodule(name.rpartition(".")[0])
        if style == "colwise" and parent not in entered:
            entered.add(parent)
            parent.register_forward_pre_hook(_entering(mesh), with_kwargs=True)
    return parts


def rows(value: DTensor) -> tuple[torch.Size, int, torch.Tensor]:
    """Whole shape, first element and local tensor of one that is cut and sharded by rows: its elements lie in one piece."""
    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return value.shape, offset[0] * value.shape[1:].numel(), value._local_tensor


@contextmanager
def columns() -> Iterator[Callable[[torch.Tensor], tuple[torch.Size, int, torch.Tensor]]]:
    """As `rows`, but of a tensor cut by columns too: whole rows are to be filled, of which the columns are kept in the end."""
    wide: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def held(value: torch.Tensor) -> tuple[torch.Size, int, torch.Tensor]:
        if not isinstance(value, DTensor):
            return value.shape, 0, value
        if value.ndim < 2 or value._local_tensor.shape[1] == value.shape[1]:
            return rows(value)
        _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        local = value._local_tensor
        room = torch.empty(local.shape[0], *value.shape[1:], dtype=local.dtype, device=local.device)
        wide.append((local, room, offset[1]))
        return value.shape, offset[0] * value.shape[1:].numel(), room

    yield held
    with torch.no_grad():
        for local, room, first in wide:
            local.copy_(room[:, first : first + local.shape[1]])


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _cut(name: str, module: Any, dimension: int, mesh: DeviceMesh) -> None:
    """Leave this rank's slice of a linear layer's weight, and of its bias where that is cut too."""
    size = mesh.size()
    if not isinstance(module, nn.Linear):
        raise _refused(mesh, f"{name} is a {type(module).__name__}, and no linear layer")
    if module.weight.shape[dimension] % size:
        raise _refused(mesh, f"does not divide {name}, of shape {list(module.weight.shape)}")
    for key, parameter in list(module.named_parameters()):
        if dimension < parameter.ndim and (key == "weight" or dimension == 0):
            local = parameter.chunk(size, dimension)[mesh.get_local_rank()].detach().contiguous()
            made = DTensor.from_local(
                local, mesh, [Shard(dimension)], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            setattr(module, key, nn.Parameter(made, parameter.requires_grad))
    module.forward = _by_rows(module) if dimension == 0 else _by_columns(module, mesh)


def _by_rows(module: nn.Linear) -> Any:
    def forward(given: torch.Tensor) -> torch.Tensor:
        bias = None if module.bias is None else _local(module.bias)
        return F.linear(given, _local(module.weight), bias)

    return forward


def _by_columns(module: nn.Linear, mesh: DeviceMesh) -> Any:
    def forward(given: torch.Tensor) -> torch.Tensor:
        added = _Leave.apply(F.linear(given, _local(module.weight)), mesh)
        return added if module.bias is None else added + module.bias

    return forward


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _entering(mesh: DeviceMesh) -> Any:
    """What a module with cut matrices is given: its gradient is the sum over the ranks."""

    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (_Enter.apply(given[0], mesh), *given[1:]), named
        return given, named | {"hidden_states": _Enter.apply(named["hidden_states"], mesh)}

    return hook


class _Enter(torch.autograd.Function):
    """The same on the way forward, a sum over the ranks on the way back."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_reduce(grad.contiguous(), "sum", ctx.mesh), None


class _Leave(torch.autograd.Function):
    """A sum over the ranks on the way forward, the same on the way back."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        return all_reduce(given, "sum", mesh)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def _refused(mesh: DeviceMesh, said: str) -> ConfigError:
    return ConfigError(
        Problem("parallel.tensor_ranks", mesh.size(), f"{said}: take 1, and parallel=fsdp over more ranks")
    )
