"""Makes a model fast and small before it is sharded, in place: fused loss, recomputed blocks, compiled blocks."""

from typing import Any

from conf.choices import Checkpointing
from conf.schema import Config
from jobs.distributed import context_parallel as context
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, fused_ops, unwrap
from jobs.model.activation_checkpointing import _keeping, _recomputed
from jobs.model.build import blocks
from jobs.model.compile import _compiled, has_pieces, is_compiled


def install(model: Any, config: Config, world: World) -> None:
    """Change the forwards of blocks and head; parameters keep their names. Before sharding, and after adapters.

    Forwards, not modules: what FSDP and ZeRO hook to a block's call stays outside, runs once, and is not traced.
    """
    context.install(unwrap.causal(model).config, world)
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
