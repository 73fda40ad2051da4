"""Makes a model fast and small before it is sharded, in place: fused loss, recomputed blocks, compiled blocks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conf.choices import AdapterKind, Backend, Checkpointing
from conf.schema import Config
from jobs.distributed import context_parallel as context
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, fused_ops
from jobs.model.build import blocks

PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "muster::product")
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


def install(model: Any, config: Config, world: World) -> None:
    """Change the forwards of blocks and head; parameters keep their names. Before sharding, and after adapters.

    Forwards, not modules: what FSDP and ZeRO hook to a block's call stays outside, runs once, and is not traced.
    """
    context.install(fused_cross_entropy.causal(model).config, world)
    compiled, fused = is_compiled(config, world), has_pieces(config, world)
    fused_cross_entropy.fuse(model, compiled or fused)
    kind = config.train.activation_checkpointing
    for block in blocks(model):
        if fused:
            fused_ops.fuse(block, _compiled)
        forward = block.forward
        if kind is Checkpointing.selective:  # inside the compiled part: the compiler then knows what must not be kept
            forward = _recomputed(block, forward, context_fn=_keeping)
        if compiled:
            forward = _compiled(forward)
        if kind in (Checkpointing.full, Checkpointing.offload):
            forward = _recomputed(block, forward, offload=kind is Checkpointing.offload)
        block.forward = forward  # type: ignore[method-assign]


def is_compiled(config: Config, world: World) -> bool:
    """Whether blocks are compiled: as the config says, else on GPUs with triton where no hooks are needed inside."""
    return _compiles(world) and not _hooked(config) if config.train.compile is None else config.train.compile


def has_pieces(config: Config, world: World) -> bool:
    """Whether norms and gated products are compiled alone: where ZeRO-3's hooks inside a block would cut it to pieces."""
    return config.train.compile is None and _compiles(world) and _hooked(config)


def _compiles(world: World) -> bool:
    return world.device.type == "cuda" and find_spec("triton") is not None


def as_one(config: Config, world: World) -> bool:
    """Whether ZeRO-3 is to gather a block as one, without hooks inside. Not under an adapter, where DeepSpeed 0.19.8 then gives
    backward a weight that it has partitioned already."""
    return _is_stage_3(config) and config.adapter.kind is AdapterKind.none and is_compiled(config, world)


def _hooked(config: Config) -> bool:
    return _is_stage_3(config) and config.adapter.kind is not AdapterKind.none


def _is_stage_3(config: Config) -> bool:
    return config.parallel.backend is Backend.zero and config.parallel.zero_stage == 3


def _compiled(forward: Forward) -> Forward:
    """For training alone: evaluation would take a compilation of its own, and let its ragged rows make training's sizes dynamic."""
    fast = torch.compile(forward)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return compiled


def _recomputed(block: nn.Module, forward: Forward, offload: bool = False, **options: Any) -> Forward:
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


def _keeping() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
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
