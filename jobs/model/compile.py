"""Decides what torch.compile compiles, whole blocks or their element-wise parts, and compiles it."""

from importlib.util import find_spec
from typing import Any

import torch

from conf.choices import AdapterKind, Backend
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model.activation_checkpointing import Forward


def compiles_blocks(config: Config, world: World) -> bool:
    """Whether blocks are compiled: as the config says, else on GPUs with triton where no hooks are needed inside."""
    return _can_compile(world) and not _hooked(config) if config.train.compile is None else config.train.compile


def compiles_fused_ops(config: Config, world: World) -> bool:
    """Whether norms and gated products are compiled alone: where ZeRO-3's hooks inside a block would cut it to pieces."""
    return config.train.compile is None and _can_compile(world) and _hooked(config)


def _can_compile(world: World) -> bool:
    return world.device.type == "cuda" and find_spec("triton") is not None


def gathers_whole_blocks(config: Config, world: World) -> bool:
    """Whether ZeRO-3 is to gather a block as one, without hooks inside. Not under an adapter, where DeepSpeed 0.19.8 then gives
    backward a weight that it has partitioned already."""
    return _is_stage_3(config) and config.adapter.kind is AdapterKind.none and compiles_blocks(config, world)


def _hooked(config: Config) -> bool:
    return _is_stage_3(config) and config.adapter.kind is not AdapterKind.none


def _is_stage_3(config: Config) -> bool:
    return config.parallel.backend is Backend.zero and config.parallel.zero_stage == 3


def compiled_for_training(forward: Forward) -> Forward:
    """For training alone: evaluation would take a compilation of its own, and let its ragged rows make training's sizes dynamic."""
    fast = torch.compile(forward)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        return (fast if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return compiled
