"""Who shards. `fsdp` and `zero` have the same few functions, so that train.py reads the same for both:

wrap(model, config, world, resumed) -> Engine    shard the model, fill it if it has no weights, make its optimizer
backward(engine, loss, last)            one micro batch; gradients are averaged over ranks on the last
step(engine, learning_rate) -> float    clip, update, clear; returns the gradient norm before clipping
save(engine, folder) / load(engine, folder)    this rank's shards of trainable weights and optimizer state
staged(engine, folder, stager, group)   copies them to host memory; what it returns writes them, on any thread
held(engine), filled(engine)            this rank's room for masters and optimizer state; to be called once that is filled
weights(engine)                         (name, whole fp32 tensor) of each trainable weight, gathered one at a time
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from conf.schema import Config


@dataclass
class Engine:
    """A sharded model with its optimizer, as a backend made it."""

    module: nn.Module
    """Called for the forward pass."""
    optimizer: Any
    max_grad_norm: float
    read_bytes: int = 0
    """What this rank read of the model's files."""
    clip: Callable[[list[nn.Parameter], float], torch.Tensor] | None = None
    """FSDP: scales the gradients of parameters down to a global norm, and returns what it was."""


def chosen(config: Config) -> ModuleType:
    """The backend that the config names; only that one is imported."""
    return import_module(f"jobs.backends.{config.parallel.backend.name}")
