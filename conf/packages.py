"""Which optional Python packages a config needs, and whether this interpreter has them."""

from collections.abc import Iterator
from importlib.util import find_spec

from conf.choices import AdapterKind, Attention, Backend, Float8, Frozen, Optimizer, ProgramLauncher
from conf.errors import Problem, as_typed
from conf.schema import Config

FLASH_ATTENTION = {
    Attention.flash_attention_2: "flash_attn",
    Attention.flash_attention_3: "flash_attn_interface",
    Attention.flash_attention_4: "flash_attn.cute",
}
"""model.attention -> the module that it needs."""
PIP_NAMES = {
    Attention.flash_attention_2: "flash-attn",
    Attention.flash_attention_3: "flash-attn-3",
    Attention.flash_attention_4: "flash-attn-4",
}
TRACKERS = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "comet": "comet_ml"}
"""Tracker -> module, which is also the name for pip."""


def missing(config: Config) -> Iterator[Problem]:
    """A problem for each package that the config needs and that this interpreter cannot import."""
    if config.custom.command is not None:
        yield from _of_program(config)
        return
    for key, value, module, pip_name, instead in _needed(config):
        if find_spec(module) is None:
            message = f"needs the package {pip_name}, which is not installed: pip install {pip_name}, or {instead}"
            yield Problem(key, as_typed(value), message)


def _of_program(config: Config) -> Iterator[Problem]:
    """A program of the user may have an interpreter and packages of its own; Ray is what Muster starts for it."""
    first = str(config.custom.command).partition(" ")[0]
    is_ours = first in ("python", "python3", "-m") or first.endswith(".py")
    if config.custom.launcher is ProgramLauncher.ray and is_ours and find_spec("ray") is None:
        message = (
            "needs the package ray, which is not installed: pip install 'ray[train]', or use custom.launcher=torchrun"
        )
        yield Problem("custom.launcher", "ray", message)


TORCHAO = "'torchao>=0.18' (Muster's extra torchao)"
"""What pip installs for float8 and for 8-bit optimizers under FSDP."""


def _needed(config: Config) -> Iterator[tuple[str, object, str, str, str]]:
    """(key, value, module, name for pip, what to use instead) for each optional package."""
    train, zero = config.train, config.parallel.backend is Backend.zero
    if zero:
        yield "parallel", config.parallel.name, "deepspeed", "deepspeed", "use parallel=fsdp"
    if train.optimizer in (Optimizer.adamw_8bit, Optimizer.paged_adamw, Optimizer.paged_adamw_8bit):
        if zero:
            yield "train.optimizer", train.optimizer.name, "bitsandbytes", "bitsandbytes", "use parallel=fsdp"
        else:
            instead = "use train.optimizer=adamw or parallel=zero2"
            yield "train.optimizer", train.optimizer.name, "torchao", TORCHAO, instead
    if train.float8 is not Float8.none:
        yield "train.float8", train.float8.name, "torchao", TORCHAO, "use train.float8=none"
    if config.adapter.kind is not AdapterKind.none:
        yield "adapter.kind", config.adapter.kind.name, "peft", "peft", "use adapter=none"
        if config.adapter.base in (Frozen.nf4, Frozen.int8):
            yield "adapter.base", config.adapter.base.name, "bitsandbytes", "bitsandbytes", "use adapter=lora"
    if config.model.attention in FLASH_ATTENTION:
        package = FLASH_ATTENTION[config.model.attention].partition(".")[0]  # looking for a part of it would import it
        pip_name = PIP_NAMES[config.model.attention]
        yield "model.attention", config.model.attention.name, package, pip_name, "use model.attention=auto"
    for name, module in TRACKERS.items():
        if getattr(config.tracker, name):
            yield f"tracker.{name}", True, module, module, f"set tracker.{name}=false"
