"""Finds this rank's part of each trained weight in DeepSpeed's flat partitions: fp32 master and optimizer state (ZeRO-1, 2, 3)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers


def local_state(module: nn.Module, optimizer: Any) -> dict[str, dict[str, TensorPart]]:
    """See `Backend.local_state`. Parts are views of the flat partitions. `optimizer` is DeepSpeed's, with torch's inside.

    Scalars, like Adam's count of steps, exist once for a whole partition, so several weights share one.
    """
    _create_optimizer_state(optimizer)
    state: dict[str, dict[str, TensorPart]] = {}
    for item in _flat_ranges(module, optimizer):
        span = slice(item.first, item.first + item.numel)
        parts = {"weight": TensorPart(item.shape, item.begin, item.flat.detach()[span], trained=True)}
        for kind, value in optimizer.optimizer.state[item.flat].items():
            is_flat = value.shape == item.flat.shape
            parts[kind] = (
                TensorPart(item.shape, item.begin, value[span], trained=True)
                if is_flat
                else TensorPart(tuple(value.shape), 0, value.view(-1), trained=True)
            )
        state[without_wrappers(item.name)] = parts
    return state


def apply_local_state(optimizer: Any) -> None:
    """Make the compute weights from the masters, as DeepSpeed does after a step. All ranks call this together."""
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # DeepSpeed keeps small parameters whole: partition them, gather them again below
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


class _FlatRange(NamedTuple):
    """Contiguous elements of a weight, and where they are in a flat partition."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole weight."""
    begin: int
    """First element of the weight that this rank has."""
    flat: torch.Tensor
    first: int
    """Position of that element in `flat`."""
    numel: int


def _flat_ranges(module: nn.Module, optimizer: Any) -> Iterator[_FlatRange]:
    """The run of each trained weight of which this rank has a part."""
    parameter: Any  # DeepSpeed adds ds_* and _hp_mapping
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_stage3(optimizer):
            group, first, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            begin = min(parameter.ds_tensor.ds_numel * dist.get_rank(), parameter.ds_numel)
            # the last ranks' partitions are padded
            count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - begin)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield _FlatRange(name, tuple(parameter.ds_shape), begin, flat, first, count)
        elif (mapping := parameter._hp_mapping) is not None:
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            in_flat, in_weight = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield _FlatRange(name, tuple(parameter.shape), in_weight.start, flat, in_flat.start, in_flat.numel)


@torch.no_grad()
def _create_optimizer_state(optimizer: Any) -> None:
    """Make the optimizer allocate its state. It does so in its first step, so take one with zero gradients and learning rate 0."""
    stage3, torch_optimizer = _is_stage3(optimizer), optimizer.optimizer
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    if stage3:
        optimizer._set_fp32_optimizer_param_groups()
    before = [(flat, flat.grad) for flat in flats]
    rates = [(group, group["lr"]) for group in torch_optimizer.param_groups]
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    for group in torch_optimizer.param_groups:
        group["lr"] = 0.0
    torch_optimizer.step()
    for flat, gradient in before:
        flat.grad = gradient
    for group, rate in rates:
        group["lr"] = rate
    if stage3:
        optimizer._clear_fp32_optimizer_param_groups()
