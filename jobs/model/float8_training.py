"""Matrix products in 8 bits, by torchao: the linear layers of blocks are exchanged before the model is sharded.

Of whole weights that are trained; a frozen base in 8 bits is `jobs.model.float8_matmul`.
"""

import torch
from torch import nn

from conf.choices import Float8
from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model.build import blocks
from jobs.model.float8_matmul import CAPABILITY, supports


def convert_linears(model: nn.Module, config: Config, world: World) -> None:
    """Exchange the layers that `train.float8` asks for. Raises ConfigError without torchao, or on a GPU without 8-bit products."""
    recipe = config.train.float8
    if recipe is Float8.none:
        return
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        said = f"needs torchao, which cannot be imported here ({error}): pip install torchao, or take none"
        raise ConfigError(Problem("train.float8", recipe.name, said)) from error
    if world.device.type != "cuda" or torch.cuda.get_device_capability(world.device) < CAPABILITY:
        found = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "a CPU"
        said = f"needs 8-bit products (compute capability 8.9 or later), and this rank has {found}: take none"
        raise ConfigError(Problem("train.float8", recipe.name, said))
    plan = (
        Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        if recipe is Float8.tensorwise
        else Float8LinearConfig.from_recipe_name("rowwise")
    )
    for block in blocks(model):
        convert_to_float8_training(block, module_filter_fn=_fits, config=plan)


def _fits(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear) and supports(module)
