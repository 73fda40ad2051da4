"""Makes a model fast and small before it is sharded, in place: fused loss, recomputed blocks, compiled blocks."""

from typing import Any

from conf.choices import Checkpointing
from conf.schema import Config
from jobs.distributed import context_parallel as context
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, fused_ops, unwrap
from jobs.model.activation_checkpointing import recomputed_in_backward, selective_contexts
from jobs.model.build import blocks
from jobs.model.compile import compiled_for_training, compiles_blocks, compiles_fused_ops


def prepare_model(model: Any, config: Config, world: World) -> None:
    """Change the forwards of blocks and head; parameters keep their names. Before sharding, and after adapters.

    Forwards, not modules: what FSDP and ZeRO hook to a block's call stays outside, runs once, and is not traced.
    """
    context.install(unwrap.causal_lm(model).config, world)
    compiled, fused = compiles_blocks(config, world), compiles_fused_ops(config, world)
    fused_cross_entropy.fuse(model, compiled or fused)
    kind = config.train.activation_checkpointing
    for block in blocks(model):
        if fused:
            fused_ops.fuse(block, compiled_for_training)
        forward = block.forward
        if kind is Checkpointing.selective:  # inside the compiled part: the compiler then knows what must not be kept
            forward = recomputed_in_backward(block, forward, context_fn=selective_contexts)
        if compiled:
            forward = compiled_for_training(forward)
        if kind in (Checkpointing.full, Checkpointing.offload):
            forward = recomputed_in_backward(block, forward, offload=kind is Checkpointing.offload)
        block.forward = forward  # type: ignore[method-assign]
