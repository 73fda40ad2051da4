"""Activation checkpointing of decoder blocks: full, selective, or full with the kept inputs offloaded to host memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conf.errors import ConfigError, Problem

MATMULS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "muster::quantized_matmul")
"""Operators that count as matrix products. Selective checkpointing saves the output of every second one."""

SAVED_OPS = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
    "muster::flash_attention_with_sinks",
    "flex_attention",
}
"""Operators that selective checkpointing always saves: attention costs much time for little memory."""


Forward = Callable[..., Any]


def with_activation_checkpointing(block: nn.Module, forward: Forward, offload: bool = False, **options: Any) -> Forward:
    """Return a forward that calls `forward` under torch.utils.checkpoint, with these `options`.

    `offload` keeps the inputs of the block in host memory until backward. Without gradients, `forward` is called directly.
    """
    checkpointed = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=_is_random(block), **options)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not offload:
            return checkpointed(*args, **kwargs)
        with _saved_tensors_on_host():
            return checkpointed(*args, **kwargs)

    return recomputed


def with_reentrant_checkpointing(block: nn.Module, forward: Forward) -> Forward:
    """The same in torch's older, reentrant way: backward runs the whole forward again, then a backward of its own inside.

    That gives gradients only to the function's own arguments that are tensors, and none at all if no argument needs one.
    """
    preserve_rng_state = _is_random(block)
    trains = any(parameter.requires_grad for parameter in block.parameters())

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        values, names = [*args, *kwargs.values()], list(kwargs)
        if any(
            _needs_gradient(item) for value in values if not isinstance(value, torch.Tensor) for item in _inside(value)
        ):
            message = "this model passes tensors with gradients inside of lists, and would lose these gradients. Set it to false"
            raise ConfigError(Problem("train.reentrant_checkpointing", True, message))
        if trains and not any(_needs_gradient(value) for value in values):  # the first block above a frozen embedding
            first = next(index for index, value in enumerate(values) if _is_float(value))
            values[first] = values[first].detach().requires_grad_()

        def call(*flat: Any) -> Any:
            return forward(*flat[: len(args)], **dict(zip(names, flat[len(args) :], strict=True)))

        return checkpoint(call, *values, use_reentrant=True, preserve_rng_state=preserve_rng_state)

    return recomputed


def _is_random(block: nn.Module) -> bool:
    """Whether the block uses dropout. Saving and restoring the random state takes time, so it is done only then."""
    return any(isinstance(module, nn.Dropout) and module.p for module in block.modules()) or any(
        getattr(module, "attention_dropout", 0) for module in block.modules()
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _inside(value: Any) -> list[Any]:
    """The items of a list, a tuple or a dictionary, at any depth."""
    items = list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple) else []
    return [*items, *(deeper for item in items for deeper in _inside(item))]


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of forward and recomputation: they save SAVED_OPS and every second of MATMULS, and recompute the rest."""
    matmuls = {False: 0, True: 0}  # how many have run: in forward (False), in recomputation (True)

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = op._schema.name if hasattr(op, "_schema") else op.name()
        saved = name in SAVED_OPS
        if name in MATMULS:
            matmuls[context.is_recompute] += 1
            saved = matmuls[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(policy)
    return contexts


@contextmanager
def _saved_tensors_on_host() -> Iterator[None]:
    """Move tensors that autograd saves inside this context to pinned host memory. On CPUs they stay where they are.

    The copy runs on its own stream, in parallel with the computation. torch's `save_on_cpu` makes the host wait for every copy.
    """
    with saved_tensors_hooks(_copy_to_host, _copy_to_device):
        yield


def _copy_to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    if not tensor.is_cuda:
        return tensor.device, tensor
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    # Without this, the allocator could hand the tensor's memory to another tensor before the copy is done.
    tensor.record_stream(stream)
    return tensor.device, host


def _copy_to_device(saved: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, host = saved
    if device.type != "cuda":
        return host
    torch.cuda.current_stream(device).wait_stream(_copy_stream(device))
    return host.to(device, non_blocking=True)


COPY_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in COPY_STREAMS:
        COPY_STREAMS[device] = torch.cuda.Stream(device)
    return COPY_STREAMS[device]
