"""DeepSpeed ZeRO-1, 2 and 3, through `deepspeed.initialize`."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from conf import deepspeed as derived
from conf.schema import AdapterKind, Config
from jobs import optim
from jobs.backends import Engine
from jobs.distributed import World

TAG = "zero"
"""DeepSpeed's name for the folder inside a checkpoint; ours is the step."""


def wrap(model: nn.Module, config: Config, world: World) -> Engine:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else DeepSpeed guesses, and warns
    import deepspeed

    # Gloo needs no such kernel. Building it takes 20 s, and a rank killed meanwhile leaves a lock all later ones wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    model.train()  # DeepSpeed casts the parameters; buffers, such as rotary frequencies, must stay fp32
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=optim.build(model, config), config=derived.plan(config, world.size)
    )
    engine.adapter_only = config.adapter.kind is not AdapterKind.none
    return Engine(engine, optimizer, config.train.max_grad_norm)


def backward(engine: Engine, loss: torch.Tensor, last: bool) -> None:
    engine.module.backward(loss, scale_wrt_gas=False)
    if not last:
        engine.module.step()  # counts the micro batch; nothing is updated


def step(engine: Engine, learning_rate: float) -> float:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.module.step()
    return float(engine.module.get_global_grad_norm())


def save(engine: Engine, folder: Path) -> None:
    engine.module.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=engine.module.adapter_only)


def load(engine: Engine, folder: Path) -> None:
    engine.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=not engine.module.adapter_only)


def weights(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in engine.module.module.named_parameters():
        if parameter.requires_grad:
            yield name, safe_get_full_fp32_param(parameter).detach().float().cpu()


def consolidate(folder: Path) -> dict[str, torch.Tensor]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return {
        name: value.detach() for name, value in get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG).items()
    }
