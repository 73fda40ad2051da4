"""What a rank of DeepSpeed's ZeRO-1, 2 and 3 holds of each trained weight: runs of its fp32 master and of its optimizer state."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jobs.tensor_io.slices import Part, plain


def held(module: nn.Module, optimizer: Any) -> dict[str, dict[str, Part]]:
    """By plain name: `weight` and whatever the optimizer keeps, as views of its flat partitions. Scalars, such as Adam's
    count of steps, are one for a whole partition. `optimizer` is DeepSpeed's, with the real one inside."""
    _make_state(optimizer)
    found: dict[str, dict[str, Part]] = {}
    for name, shape, begin, flat, first, count in _runs(module, optimizer):
        parts = {"weight": Part(shape, begin, flat.detach()[first : first + count], trained=True)}
        for kind, value in optimizer.optimizer.state[flat].items():
            whole = value.shape == flat.shape
            parts[kind] = (
                Part(shape, begin, value[first : first + count], trained=True)
                if whole
                else Part(tuple(value.shape), 0, value.view(-1), trained=True)
            )
        found[plain(name)] = parts
    return found


def filled(optimizer: Any) -> None:
    """Make the weights of compute from the masters, as DeepSpeed does after a step. All ranks call this together."""
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # small parameters are kept whole: partition them, and gather them anew
    for number in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    optimizer.checkpoint_event_epilogue()


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _runs(module: nn.Module, optimizer: Any) -> Iterator[tuple[str, tuple[int, ...], int, torch.Tensor, int, int]]:
    """(name, whole shape, first element here, flat partition, where it begins there, elements) of each weight held here."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_stage3(optimizer):
            group, first, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            begin = min(parameter.ds_tensor.ds_numel * dist.get_rank(), parameter.ds_numel)
            count = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - begin)  # the last ranks' parts are padded
            yield name, tuple(parameter.ds_shape), begin, optimizer.fp32_partitioned_groups_flat[group], first, count
        elif (here := parameter._hp_mapping) is not None:
            flat = optimizer.single_partition_of_fp32_groups[here.param_group_index]
            inside, outside = here.hp_fragment_address, here.lp_fragment_address
            yield name, tuple(parameter.shape), outside.start, flat, inside.start, inside.numel


@torch.no_grad()
def _make_state(optimizer: Any) -> None:
    """Let the optimizer make its state, which it does in its first step: one without gradients or a learning rate."""
    stage3, real = _is_stage3(optimizer), optimizer.optimizer
    flats = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    if stage3:
        optimizer._set_fp32_optimizer_param_groups()
    before = [(flat, flat.grad) for flat in flats]
    rates = [(group, group["lr"]) for group in real.param_groups]
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    for group in real.param_groups:
        group["lr"] = 0.0
    real.step()
    for flat, gradient in before:
        flat.grad = gradient
    for group, rate in rates:
        group["lr"] = rate
    if stage3:
        optimizer._clear_fp32_optimizer_param_groups()
