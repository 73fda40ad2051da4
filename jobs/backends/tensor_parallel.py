"""Tensor parallelism: each of several neighboring ranks has a slice of every matrix of a block; partial results are summed.

Projections into the heads or the inner width are cut by rows, projections back by columns (Shoeybi 2019, "Megatron-LM"), as
transformers' plan for the model says. So a block needs two all-reduces in forward and two in backward. All other weights are whole
on each rank.
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
from conf.families import TENSOR_STYLES
from jobs.model.unwrap import causal_lm

MESH_DIM = "tensor"
"""Name of the mesh dimension of tensor parallelism."""


def slice_matrices(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Cut the matrices of `model` over `mesh`. Call it on a model without weights (meta device), before sharding.

    Returns the modules whose weights are whole but see this rank's heads only: `grad_clip.clip` sums their gradients. Raises
    ConfigError if the model has no plan, a plan with other styles, or dimensions that the number of tensor ranks does not divide.
    """
    language_model = causal_lm(model)
    plan = getattr(language_model.config.get_text_config(), "base_model_tp_plan", None) or {}
    plan = {name: style for name, style in plan.items() if not style.startswith("embedding")}  # embeddings stay whole
    problems = [f"cannot cut {name} in the style {style}" for name, style in plan.items() if style not in TENSOR_STYLES]
    if not plan or problems:
        no_plan = f"transformers has no tensor-parallel plan for {type(language_model).__name__}"
        raise _config_error(mesh, problems[0] if problems else no_plan)
    parts: list[nn.Module] = []
    entered: set[nn.Module] = set()
    for name, module in language_model.base_model.named_modules():
        style = next((style for pattern, style in plan.items() if _matches(pattern, name)), None)
        if style is None:
            continue
        if style == TENSOR_STYLES[2]:
            parts.append(module)
            continue
        _slice_linear(name, module, 0 if style == "colwise" else 1, mesh)
        parent = language_model.base_model.get_submodule(name.rpartition(".")[0])
        if style == "colwise" and parent not in entered:
            entered.add(parent)
            parent.register_forward_pre_hook(_sum_input_gradient(mesh), with_kwargs=True)
    return parts


def rows(value: DTensor) -> tuple[torch.Size, int, torch.Tensor]:
    """(whole shape, first element, local tensor) of a tensor that is cut and sharded by rows: its elements are contiguous."""
    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return value.shape, offset[0] * value.shape[1:].numel(), value._local_tensor


@contextmanager
def whole_rows_for_loading() -> Iterator[Callable[[torch.Tensor], tuple[torch.Size, int, torch.Tensor]]]:
    """Let a loader read every tensor as contiguous elements, also tensors that are cut by columns.

    Yields a function like `rows` that takes any tensor. For one that is cut by columns it returns temporary memory for whole
    rows. On exit, this rank's columns are copied from that memory into the tensor.
    """
    wide: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def local_rows(value: torch.Tensor) -> tuple[torch.Size, int, torch.Tensor]:
        if not isinstance(value, DTensor):
            return value.shape, 0, value
        if value.ndim < 2 or value._local_tensor.shape[1] == value.shape[1]:
            return rows(value)
        _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        local = value._local_tensor
        whole_rows = torch.empty(local.shape[0], *value.shape[1:], dtype=local.dtype, device=local.device)
        wide.append((local, whole_rows, offset[1]))
        return value.shape, offset[0] * value.shape[1:].numel(), whole_rows

    yield local_rows
    with torch.no_grad():
        for local, whole_rows, first in wide:
            local.copy_(whole_rows[:, first : first + local.shape[1]])


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _slice_linear(name: str, module: Any, dimension: int, mesh: DeviceMesh) -> None:
    """Replace a linear layer's weight by this rank's slice, and its bias too if the weight is cut by rows (`dimension` 0)."""
    size = mesh.size()
    if not isinstance(module, nn.Linear):
        raise _config_error(mesh, f"cannot cut {name}: it is a {type(module).__name__}, not a linear layer")
    if module.weight.shape[dimension] % size:
        raise _config_error(mesh, f"does not divide {name}, which has the shape {list(module.weight.shape)}")
    for key, parameter in list(module.named_parameters()):
        if dimension < parameter.ndim and (key == "weight" or dimension == 0):
            local = parameter.chunk(size, dimension)[mesh.get_local_rank()].detach().contiguous()
            sliced = DTensor.from_local(
                local, mesh, [Shard(dimension)], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
            setattr(module, key, nn.Parameter(sliced, parameter.requires_grad))
    forward = _row_forward(module) if dimension == 0 else _column_forward(module, mesh)
    module.forward = forward  # type: ignore[method-assign]


def _row_forward(module: nn.Linear) -> Any:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        bias = None if module.bias is None else local_tensor(module.bias)
        return F.linear(inputs, local_tensor(module.weight), bias)

    return forward


def _column_forward(module: nn.Linear, mesh: DeviceMesh) -> Any:
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _SumOverTensorRanks.apply(F.linear(inputs, local_tensor(module.weight)), mesh)  # type: ignore[no-untyped-call]
        # The bias is whole on each rank: it is added once, after the sum
        return output if module.bias is None else output + module.bias

    return forward


def local_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _sum_input_gradient(mesh: DeviceMesh) -> Any:
    """A forward pre-hook: the gradient of the module's input is summed over the tensor ranks."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_CopyToTensorRanks.apply(args[0], mesh), *args[1:]), kwargs  # type: ignore[no-untyped-call]
        hidden_states = _CopyToTensorRanks.apply(kwargs["hidden_states"], mesh)  # type: ignore[no-untyped-call]
        return args, kwargs | {"hidden_states": hidden_states}

    return hook


class _CopyToTensorRanks(torch.autograd.Function):
    """Identity in forward, all-reduce of the gradient in backward (Megatron-LM's `f`)."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return all_reduce(grad.contiguous(), "sum", ctx.mesh), None


class _SumOverTensorRanks(torch.autograd.Function):
    """All-reduce in forward, identity in backward (Megatron-LM's `g`)."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        summed: torch.Tensor = all_reduce(inputs, "sum", mesh)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def _config_error(mesh: DeviceMesh, reason: str) -> ConfigError:
    return ConfigError(
        Problem(
            "parallel.tensor_ranks",
            mesh.size(),
            f"{reason}: set parallel.tensor_ranks=1 and use parallel=fsdp on more ranks",
        )
    )
