"""Decides what torch.compile compiles: whole decoder blocks, or only their element-wise operations."""

from importlib.util import find_spec
from typing import Any

import torch

from conf.choices import AdapterKind, Backend
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model.activation_checkpointing import Forward


def compiles_blocks(config: Config, world: World) -> bool:
    """Whether decoder blocks are compiled: `train.compile`, or by default on GPUs with triton if no hooks run inside a block."""
    if config.train.compile is not None:
        return config.train.compile
    return _can_compile(world) and not _has_inner_hooks(config)


def compiles_fused_ops(config: Config, world: World) -> bool:
    """Whether norms and gated activations are compiled one by one (`jobs.model.fused_ops`).

    This is the case where ZeRO-3 needs hooks inside a block: each hook would break the graph of a compiled block.
    """
    return config.train.compile is None and _can_compile(world) and _has_inner_hooks(config)


def _can_compile(world: World) -> bool:
    return world.device.type == "cuda" and find_spec("triton") is not None


def gathers_whole_blocks(config: Config, world: World) -> bool:
    """Whether ZeRO-3 gathers each block as a whole, without hooks inside it (DeepSpeed calls this a leaf module).

    Not with an adapter: DeepSpeed 0.19.8 then uses a weight in backward that it has already partitioned again.
    """
    return _is_stage_3(config) and config.adapter.kind is AdapterKind.none and compiles_blocks(config, world)


def _has_inner_hooks(config: Config) -> bool:
    """Whether ZeRO-3 hooks the modules inside a block: it does with an adapter, see `gathers_whole_blocks`."""
    return _is_stage_3(config) and config.adapter.kind is not AdapterKind.none


def _is_stage_3(config: Config) -> bool:
    return config.parallel.backend is Backend.zero and config.parallel.zero_stage == 3


def compiled_for_training(forward: Forward) -> Forward:
    """Compile `forward` for training; evaluation keeps running the plain one.

    Evaluation would need a compilation of its own. Its rows of many lengths would also make the compiler treat the sizes of
    training as dynamic.
    """
    compiled = torch.compile(forward)

    def compiled_with_gradients(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return compiled_with_gradients
