"""Activation checkpointing of decoder blocks: full, selective, or full with the kept inputs offloaded to host memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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
    # Saving and restoring the random state takes time, so it is done only for blocks that use dropout.
    random = any(isinstance(module, nn.Dropout) and module.p for module in block.modules()) or any(
        getattr(module, "attention_dropout", 0) for module in block.modules()
    )
    checkpointed = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=random, **options)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not offload:
            return checkpointed(*args, **kwargs)
        with _saved_tensors_on_host():
            return checkpointed(*args, **kwargs)

    return recomputed


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
