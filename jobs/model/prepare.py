"""Applies Muster's changes of a model's forwards before the model is sharded: fused loss, recomputation, compilation.

The order matters:

1. Context parallelism: open its process groups, if `parallel.context_ranks` asks for them. Attention uses them.
2. Output head and loss become one operation (`fused_cross_entropy`).
3. In every block, the first that applies comes innermost:
   a. element-wise operations are compiled alone, where the block cannot be compiled whole (`fused_ops`);
   b. selective recomputation, inside the compiled code: the compiler then knows what it must not keep for backward;
   c. the block is compiled;
   d. full recomputation, outside the compiled code.
"""

from typing import Any

from conf.choices import Checkpointing
from conf.schema import Config
from jobs.distributed import context_parallel
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, fused_ops, unwrap
from jobs.model.activation_checkpointing import selective_contexts, with_activation_checkpointing
from jobs.model.build import blocks
from jobs.model.compile import compiled_for_training, compiles_blocks, compiles_fused_ops


def prepare_model(model: Any, config: Config, world: World) -> None:
    """Change the forwards of the output head and the blocks, in place. Call it after adapters are added and before sharding.

    Forwards are replaced, not modules, so that parameters keep their names. FSDP's and ZeRO's hooks on a block stay outside:
    they run once per call, and the compiler does not trace them.
    """
    context_parallel.create_groups(unwrap.causal_lm(model).config, world)
    compiles_block, compiles_ops = compiles_blocks(config, world), compiles_fused_ops(config, world)
    fused_cross_entropy.fuse(model, compiled=compiles_block or compiles_ops)
    checkpointing = config.train.activation_checkpointing
    for block in blocks(model):
        if compiles_ops:
            fused_ops.fuse(block, compiled_for_training)
        forward = block.forward
        if checkpointing is Checkpointing.selective:
            forward = with_activation_checkpointing(block, forward, context_fn=selective_contexts)
        if compiles_block:
            forward = compiled_for_training(forward)
        if checkpointing in (Checkpointing.full, Checkpointing.offload):
            forward = with_activation_checkpointing(block, forward, offload=checkpointing is Checkpointing.offload)
        block.forward = forward
