"""Shards a model over the ranks, trains it, and saves it: one module for torch FSDP2 (`fsdp`), one for DeepSpeed ZeRO (`zero`).

Both modules have the functions of the protocol `Backend`, so train.py reads the same for both. May import `conf` and the folders of
jobs from `distributed` to `monitoring`, in the order of tests/test_layers.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from conf.schema import Config
from jobs.backends.host_staging import Stager
from jobs.distributed.process_group import World
from jobs.tensor_io.slices import TensorPart


@dataclass
class Engine:
    """A sharded model with its optimizer, as a backend made it."""

    module: Any
    """Called for the forward pass: the nn.Module itself (FSDP), or the DeepSpeedEngine around it (ZeRO)."""
    optimizer: Any
    """torch's optimizer (FSDP) or DeepSpeed's, which has torch's inside (ZeRO)."""
    max_grad_norm: float
    read_bytes: int = 0
    """Bytes that this rank read of the model's files."""
    clip: Callable[[list[nn.Parameter], float], torch.Tensor] | None = None
    """FSDP only: scales gradients to a global norm, and returns the norm before."""


class Backend(Protocol):
    """The functions of a backend module. All ranks call each of them together, except where it says otherwise."""

    def wrap(self, model: nn.Module, config: Config, world: World, resumed: bool = False) -> Engine:
        """Shard `model` and make its optimizer. A model on the meta device also gets its weights.

        `resumed`: a checkpoint is loaded next, so do not read the weights that it will overwrite.
        """

    def backward(self, engine: Engine, loss: torch.Tensor, last: bool) -> None:
        """Backward of one micro batch. Gradients are averaged over the ranks with the `last` one of the step."""

    def step(self, engine: Engine, learning_rate: float) -> float:
        """Clip the gradients, update the weights, clear the gradients. Returns the gradient norm before clipping."""

    def save(self, engine: Engine, folder: Path) -> None:
        """Write this rank's shards of the trainable weights and the optimizer state into `folder`."""

    def load(self, engine: Engine, folder: Path) -> None:
        """Load what `save` wrote with the same layout."""

    def storage_bytes(self, engine: Engine) -> list[int]:
        """Bytes of each tensor storage that `stage` is going to copy, so that host memory can be allocated before."""

    def stage(self, engine: Engine, folder: Path, stager: Stager, group: ProcessGroup) -> Callable[[], object]:
        """Copy to host memory what `save` writes. Returns a function that writes the copy into `folder`, on any thread.

        `group`: for the collectives of that function, which must not mix with those of training.
        """

    def local_state(self, engine: Engine) -> dict[str, dict[str, TensorPart]]:
        """This rank's parts of master weights and optimizer state, as views that may be filled: weight name -> kind -> part."""

    def apply_local_state(self, engine: Engine) -> None:
        """Make the weights used in forward from the master weights. Call it after the views of `local_state` are filled."""

    def weights(self, engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole fp32 tensor on the CPU) of each trainable weight, gathered one at a time."""


def import_backend(config: Config) -> Backend:
    """The module of the backend that the config names. Only that one is imported."""
    return cast(Backend, import_module(f"jobs.backends.{config.parallel.backend.name}"))
