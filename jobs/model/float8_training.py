"""Converts the linear layers of decoder blocks to torchao's float8 training, before the model is sharded.

This is for full fine-tuning, where the weights are trained. `jobs.model.float8_matmul` is for a frozen base.
"""

import torch
from torch import nn

from conf.choices import Float8
from conf.errors import ConfigError, Problem
from conf.packages import TORCHAO
from conf.precision import LOWEST_CAPABILITY
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model.build import blocks
from jobs.model.float8_matmul import supports


def convert_linears(model: nn.Module, config: Config, world: World) -> None:
    """Convert the layers that `train.float8` asks for, in place.

    Raises ConfigError if torchao is not installed, or on a device without float8 products.
    """
    recipe = config.train.float8
    if recipe is Float8.none:
        return
    try:
        from torchao.float8 import (
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        message = (
            f"needs torchao, which cannot be imported here ({error}): pip install {TORCHAO}, or set train.float8=none"
        )
        raise ConfigError(Problem("train.float8", recipe.name, message)) from error
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) < LOWEST_CAPABILITY["float8"]:
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "a CPU"
        message = (
            f"needs GPUs with float8 products (compute capability 8.9 or later), but this rank has {device}: "
            "set train.float8=none"
        )
        raise ConfigError(Problem("train.float8", recipe.name, message))
    linear_config = (
        Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        if recipe is Float8.tensorwise
        else Float8LinearConfig.from_recipe_name("rowwise")
    )
    for block in blocks(model):
        convert_to_float8_training(block, module_filter_fn=_is_supported_linear, config=linear_config)


def _is_supported_linear(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear) and supports(module)
