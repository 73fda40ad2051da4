"""The optimizer, and the learning rate as a function of the step."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

from conf.choices import Backend, Optimizer
from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.model.unwrap import causal_lm
from jobs.training.adafactor import Adafactor

MOMENTUM = 0.95
"""Muon's, as in Jordan 2024 and in Liu 2025 (arXiv 2502.16982), which also scales its update to that of AdamW."""


class CombinedOptimizer:
    """Optimizers of different parameters, used like one optimizer.

    Iterating gives the optimizers: torch.distributed.checkpoint's state dictionaries take such an iterable.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def build(model: nn.Module, config: Config) -> Any:
    """`train.optimizer` over the trainable parameters; only matrices decay. Raises ConfigError where its package is missing.

    AdamW is fused where the parameters are on a GPU by now, as FSDP's are.
    """
    train, kind = config.train, config.train.optimizer
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam: dict[str, Any] = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.eps}
    if kind is Optimizer.adamw:
        return torch.optim.AdamW(_groups(trainable, config), **adam, fused=trainable[0].is_cuda)
    if kind is Optimizer.adafactor:
        return Adafactor(_groups(trainable, config), lr=train.learning_rate)
    if kind is Optimizer.muon:
        inside = causal_lm(model)
        outer = [inside.get_input_embeddings(), inside.get_output_embeddings()]
        outside = {id(parameter) for module in outer if module is not None for parameter in module.parameters()}
        hidden = [item for item in trainable if item.ndim == 2 and id(item) not in outside]
        others = [item for item in trainable if item.ndim != 2 or id(item) in outside]
        decay = {"weight_decay": train.weight_decay, "momentum": MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(hidden, lr=train.learning_rate, **decay)
        if not others:  # under an adapter
            return CombinedOptimizer(muon)
        return CombinedOptimizer(muon, torch.optim.AdamW(_groups(others, config), **adam, fused=trainable[0].is_cuda))
    return _small(config)(_groups(trainable, config), **adam)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Of every group; in place where it is a tensor, which torchao compiles into its step and refuses to see replaced."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def _groups(trainable: Iterable[nn.Parameter], config: Config) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest; those of another mesh apart, for one operation takes tensors of one mesh."""
    found: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for parameter in trainable:
        found.setdefault((_ndim(parameter) < 2, getattr(parameter, "device_mesh", None)), []).append(parameter)
    return [
        {"params": members, "weight_decay": 0.0 if vector else config.train.weight_decay}
        for (vector, _), members in sorted(found.items(), key=lambda item: item[0][0])
    ]


def _small(config: Config) -> Any:
    """The class of an 8-bit or paged AdamW: bitsandbytes' works on plain tensors, as ZeRO has them, torchao's on FSDP's."""
    kind = config.train.optimizer
    fsdp = config.parallel.backend is Backend.fsdp
    module, name = ("torchao.optim", "AdamW8bit") if fsdp else ("bitsandbytes.optim", BITSANDBYTES[kind])
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        package, other = module.split(".")[0], "parallel=zero2" if fsdp else "parallel=fsdp"
        said = f"needs {package}, which cannot be imported here ({error}): pip install {package}, or take {other}"
        raise ConfigError(Problem("train.optimizer", kind.name, said)) from error


BITSANDBYTES = {
    Optimizer.adamw_8bit: "AdamW8bit",
    Optimizer.paged_adamw: "PagedAdamW32bit",
    Optimizer.paged_adamw_8bit: "PagedAdamW8bit",
}


def _ndim(parameter: nn.Parameter) -> int:
    """Of the whole weight: one that ZeRO-3 has partitioned calls itself an empty vector, and would not decay."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
