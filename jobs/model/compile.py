"""Decides what torch.compile compiles: whole decoder blocks, or only their element-wise operations."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from conf.choices import AdapterKind, Attention, Backend
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model.activation_checkpointing import Forward


def compiles_blocks(config: Config, world: World) -> bool:
    """Whether decoder blocks are compiled: `train.compile`, or by default on GPUs with triton if nothing inside prevents it."""
    if config.train.compile is not None:
        return config.train.compile
    return _can_compile(world) and not _is_compiled_inside(config)


def compiles_fused_ops(config: Config, world: World) -> bool:
    """Whether norms and gated activations are compiled one by one (`jobs.model.fused_ops`).

    This is the case where ZeRO-3 needs hooks inside a block: each hook would break the graph of a compiled block. It is also the
    case for flex attention, which transformers compiles alone: inside a block, torch 2.11 found no kernel for rows of many lengths.
    """
    return config.train.compile is None and _can_compile(world) and _is_compiled_inside(config)


def _can_compile(world: World) -> bool:
    return world.device.type == "cuda" and find_spec("triton") is not None


def gathers_whole_blocks(config: Config, world: World) -> bool:
    """Whether ZeRO-3 gathers each block as a whole, without hooks inside it (DeepSpeed calls this a leaf module).

    Not with an adapter: DeepSpeed 0.19.8 then uses a weight in backward that it has already partitioned again.
    """
    return _is_stage_3(config) and config.adapter.kind is AdapterKind.none and compiles_blocks(config, world)


def _is_compiled_inside(config: Config) -> bool:
    """Whether parts of a block are compiled, and not the block as a whole."""
    return _has_inner_hooks(config) or config.model.attention is Attention.flex


def _has_inner_hooks(config: Config) -> bool:
    """Whether ZeRO-3 hooks the modules inside a block: it does with an adapter, see `gathers_whole_blocks`."""
    return _is_stage_3(config) and config.adapter.kind is not AdapterKind.none


def _is_stage_3(config: Config) -> bool:
    return config.parallel.backend is Backend.zero and config.parallel.zero_stage == 3


def parts(block: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The parts of a block that are compiled each alone, with whether each is; the block alone if all of it can be compiled.

    Some layers cannot: the compiler would need minutes for each length of rows, or compile them again in each step and give up in
    the middle of one, so that recomputation runs other code than forward. The layers around them are compiled.
    """
    if not any(map(why_not_compiled, block.modules())):
        return [(block, True)]
    if why_not_compiled(block):
        return [(block, False)]
    runs_alone = type(block).forward is not nn.Module.forward  # a list of layers has no forward
    children = [part for child in block.children() for part in parts(child)]
    return children if children or not runs_alone else [(block, True)]


def why_not_compiled(layer: nn.Module) -> str:
    """Why the compiler cannot compile this layer itself, for the log; an empty string if it can."""
    if type(layer).__name__ == "ParamWrapper":
        # PEFT gives the experts another class in each forward, with the adapted matrices as properties
        return "adapters on experts"
    if any(isinstance(child, nn.Conv1d) for child in layer.children()) or "Lightning" in type(layer).__name__:
        # transformers' own code of linear attention and Mamba loops over parts of the row, and each turn would be compiled
        return "recurrent layers"
    return ""


def compiled_for_training(forward: Forward) -> Forward:
    """Compile `forward` for training; evaluation keeps running the plain one.

    Evaluation would need a compilation of its own. Its rows of many lengths would also make the compiler treat the sizes of
    training as dynamic.
    """
    compiled = torch.compile(forward)

    def compiled_with_gradients(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return compiled_with_gradients
