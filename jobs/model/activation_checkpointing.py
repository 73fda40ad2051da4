"""Activation checkpointing of decoder blocks: full, selective, or with the kept inputs in host memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "muster::quantized_matmul")


KEPT = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
    "flex_attention",
}
"""What selective recomputation keeps, besides every second matrix product: costly to compute for the memory it takes."""


Forward = Callable[..., Any]


def recomputed_in_backward(block: nn.Module, forward: Forward, offload: bool = False, **options: Any) -> Forward:
    """`forward`, done again in backward. Random numbers are drawn as before only where something is dropped at random."""
    random = any(isinstance(module, nn.Dropout) and module.p for module in block.modules()) or any(
        getattr(module, "attention_dropout", 0) for module in block.modules()
    )
    again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=random, **options)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not offload:
            return again(*args, **kwargs)
        with _on_host():
            return again(*args, **kwargs)

    return recomputed


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of forward and recomputation that keep what KEPT says."""
    products = {False: 0, True: 0}  # counted in forward and in recomputation

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        name = op._schema.name if hasattr(op, "_schema") else op.name()
        kept = name in KEPT
        if name in PRODUCTS:
            products[context.is_recompute] += 1
            kept = products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@contextmanager
def _on_host() -> Iterator[None]:
    """What is kept for backward meanwhile, the inputs of recomputed blocks, waits in pinned host memory, copied beside the
    computation. On CPUs it stays where it is. `save_on_cpu` would let the host wait for every copy."""
    with saved_tensors_hooks(_park, _fetch):
        yield


def _park(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    if not tensor.is_cuda:
        return tensor.device, tensor
    beside = _stream(tensor.device)
    beside.wait_stream(torch.cuda.current_stream(tensor.device))
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.stream(beside):
        kept.copy_(tensor, non_blocking=True)
    tensor.record_stream(beside)  # its memory is not used again before the copy is done
    return tensor.device, kept


def _fetch(parked: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, kept = parked
    if device.type != "cuda":
        return kept
    torch.cuda.current_stream(device).wait_stream(_stream(device))
    return kept.to(device, non_blocking=True)


STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in STREAMS:
        STREAMS[device] = torch.cuda.Stream(device)
    return STREAMS[device]
