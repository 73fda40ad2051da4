"""Applies Muster's changes of a model's forwards before the model is sharded: fused loss, recomputation, compilation.

The order matters:

1. Context parallelism: open its process groups, if `parallel.context_ranks` asks for them. Attention uses them.
2. Output head and loss become one operation (`fused_cross_entropy`).
3. In every block, the first that applies comes innermost:
   a. element-wise operations are compiled alone, where the block cannot be compiled whole (`fused_ops`);
   b. selective recomputation, inside the compiled code: the compiler then knows what it must not keep for backward;
   c. the block is compiled, or its parts, if one of them cannot be (`compile.parts`): then b. is applied to each part;
   d. full recomputation, outside the compiled code.
"""

from typing import Any

from torch import nn

from conf.choices import Checkpointing
from conf.schema import Config
from jobs.distributed import context_parallel
from jobs.distributed.log_once import log_once
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, fused_ops, kernel_barriers, unwrap
from jobs.model.activation_checkpointing import (
    Forward,
    selective_contexts,
    with_activation_checkpointing,
    with_reentrant_checkpointing,
)
from jobs.model.build import blocks
from jobs.model.compile import compiled_for_training, compiles_blocks, compiles_fused_ops, parts, why_not_compiled


def prepare_model(model: Any, config: Config, world: World) -> None:
    """Change the forwards of the output head and the blocks, in place. Call it after adapters are added and before sharding.

    Forwards are replaced, not modules, so that parameters keep their names. FSDP's and ZeRO's hooks on a block stay outside:
    they run once per call, and the compiler does not trace them.
    """
    context_parallel.create_groups(unwrap.causal_lm(model).config, world)
    compiles_block, compiles_ops = compiles_blocks(config, world), compiles_fused_ops(config, world)
    if compiles_block or compiles_ops:
        kernel_barriers.install()
    fused_cross_entropy.fuse(model, compiled=compiles_block or compiles_ops)
    checkpointing = config.train.activation_checkpointing
    for block in blocks(model):
        if compiles_ops:
            fused_ops.fuse(block, compiled_for_training)
        for part, is_compiled in parts(block) if compiles_block else [(block, False)]:
            if part is not block and not is_compiled:
                log_once(f"compile: {why_not_compiled(part)} are not compiled, but the layers around them are")
            part.forward = _part_forward(part, checkpointing, is_compiled, part is block)
        if checkpointing in (Checkpointing.full, Checkpointing.offload):
            offload = checkpointing is Checkpointing.offload
            block.forward = (
                with_reentrant_checkpointing(block, block.forward)
                if config.train.reentrant_checkpointing
                else with_activation_checkpointing(block, block.forward, offload=offload)
            )


def _part_forward(part: nn.Module, checkpointing: Checkpointing, is_compiled: bool, is_block: bool) -> Forward:
    """The forward of a block, or of a part of one, with selective recomputation and compilation."""
    forward = part.forward
    if checkpointing is Checkpointing.selective:
        # What is kept are matrix products; those of a part that is not compiled are in loops or among experts, and many
        contexts: dict[str, Any] = {"context_fn": selective_contexts} if is_compiled or is_block else {}
        forward = with_activation_checkpointing(part, forward, **contexts)
    return compiled_for_training(forward) if is_compiled else forward
