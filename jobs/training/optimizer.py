"""Builds the optimizer that the config asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from conf.choices import Backend, Optimizer
from conf.errors import ConfigError, Problem
from conf.packages import TORCHAO
from conf.schema import Config
from jobs.model import trained_weights
from jobs.model.unwrap import causal_lm
from jobs.tensor_io.wrapper_names import without_wrappers
from jobs.training.adafactor import Adafactor

MOMENTUM = 0.95
"""Momentum of Muon, as in Jordan 2024 and in Liu 2025 (arXiv 2502.16982). The latter also scales updates to the size of AdamW's."""


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
    """Return `train.optimizer` over the trainable parameters, with weight decay for matrices only.

    Raises ConfigError if a package that the optimizer needs is not installed, or a pattern of `train.learning_rates` is found in
    no name. AdamW uses torch's fused kernel if the parameters are already on a GPU, as with FSDP.
    """
    train, kind = config.train, config.train.optimizer
    trainable = [
        (without_wrappers(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]
    trained_weights.require_found(list(train.learning_rates), [name for name, _ in trainable], "train.learning_rates")
    adam: dict[str, Any] = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.eps}
    if kind is Optimizer.adamw:
        return torch.optim.AdamW(_groups(trainable, config), **adam, fused=trainable[0][1].is_cuda)
    if kind is Optimizer.adafactor:
        return Adafactor(_groups(trainable, config), lr=train.learning_rate)
    if kind is Optimizer.muon:
        inner = causal_lm(model)
        embeddings = [inner.get_input_embeddings(), inner.get_output_embeddings()]
        embedding_ids = {
            id(parameter) for module in embeddings if module is not None for parameter in module.parameters()
        }
        matrices = [item for item in trainable if item[1].ndim == 2 and id(item[1]) not in embedding_ids]
        others = [item for item in trainable if item[1].ndim != 2 or id(item[1]) in embedding_ids]
        muon = torch.optim.Muon(
            _groups(matrices, config),
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            momentum=MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        if not others:  # an adapter has matrices only
            return CombinedOptimizer(muon)
        return CombinedOptimizer(
            muon, torch.optim.AdamW(_groups(others, config), **adam, fused=trainable[0][1].is_cuda)
        )
    return _low_memory_adamw(config)(_groups(trainable, config), **adam)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of every parameter group, in proportion to its own peak (`train.learning_rates`).

    torchao keeps it in a tensor that its compiled step reads, and refuses another object in its place: fill that tensor.
    """
    for group in optimizer.param_groups:
        rate = learning_rate * group["peak_ratio"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def kept_peak_ratios(optimizer: Any) -> Iterator[None]:
    """Keep the peaks of the config while a checkpoint is loaded that has those of the run before its learning rate changed."""
    ratios = [group["peak_ratio"] for group in optimizer.param_groups]
    yield
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        group["peak_ratio"] = ratio


def _groups(trainable: list[tuple[str, nn.Parameter]], config: Config) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, vectors without, and a group for each kind of learning rate and device mesh.

    `peak_ratio` is the peak of the group's learning rate as a share of `train.learning_rate`. The optimizer updates a group in
    one operation (foreach), and such an operation takes only tensors of one mesh. The groups do not depend on the value of
    `train.learning_rate`, which may change at a resume: ZeRO's checkpoints have the state of each group under its number.
    """
    train = config.train
    groups: dict[tuple[bool, int, float, Any], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        kind, rate = trained_weights.peak_of(name, config)
        key = (_ndim(parameter) < 2, kind, rate, getattr(parameter, "device_mesh", None))
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": members,
            "weight_decay": 0.0 if vector else train.weight_decay,
            "peak_ratio": rate / train.learning_rate if rate != train.learning_rate else 1.0,
        }
        for (vector, _, rate, _), members in sorted(groups.items(), key=lambda item: item[0][:2])
    ]


def _low_memory_adamw(config: Config) -> Any:
    """The class of an 8-bit or paged AdamW: from torchao for FSDP's DTensors, from bitsandbytes for ZeRO's plain tensors."""
    kind = config.train.optimizer
    fsdp = config.parallel.backend is Backend.fsdp
    module, name = ("torchao.optim", "AdamW8bit") if fsdp else ("bitsandbytes.optim", BITSANDBYTES[kind])
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        package, alternative = module.split(".")[0], "parallel=zero2" if fsdp else "parallel=fsdp"
        pip_name = TORCHAO if fsdp else package
        message = (
            f"needs {package}, which cannot be imported here ({error}): pip install {pip_name}, or set {alternative}"
        )
        raise ConfigError(Problem("train.optimizer", kind.name, message)) from error


BITSANDBYTES = {  # train.optimizer -> the class in bitsandbytes.optim
    Optimizer.adamw_8bit: "AdamW8bit",
    Optimizer.paged_adamw: "PagedAdamW32bit",
    Optimizer.paged_adamw_8bit: "PagedAdamW8bit",
}


def _ndim(parameter: nn.Parameter) -> int:
    """Number of dimensions of the whole weight. ZeRO-3 leaves an empty vector in place of a partitioned weight; by that shape
    matrices would get no weight decay."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
