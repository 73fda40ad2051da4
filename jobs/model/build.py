"""Builds tokenizer and model from the config: with or without weights, with or without adapters."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from conf.choices import AdapterKind, Frozen, Init, Precision
from conf.errors import ConfigError, Problem, first_line
from conf.schema import Config
from jobs.model import attention, embedding_resize, materialize, quantized_linear
from jobs.model.lora import adapted
from jobs.tensor_io.dtypes import PRECISIONS
from jobs.tokenization.tokenizer import load_tokenizer, revision

DTYPES = {name: dtype.torch for name, dtype in PRECISIONS.items()}


def build(config: Config) -> Any:
    """The whole model on the CPU: fp32 master weights, or under an adapter a frozen base in the precision of compute.

    Raises ConfigError when the source cannot be loaded.
    """
    model = skeleton(config)
    materialize.materialise(model, lambda parameter: torch.empty_like(parameter, device="cpu"), torch.device("cpu"))
    held = materialize.parts(model, lambda parameter: (parameter.shape, 0, parameter))
    materialize.fill(model, skeleton, held, config)
    return model


def skeleton(config: Config, adapters: bool = True) -> Any:
    """The model of `build` without weights: parameters on the meta device, buffers with their values, with its adapters or not.

    Its embedding has a row for every token of the tokenizer; rows that are in no file get the mean of the others.
    Raises ConfigError when the source has no usable config.json.
    """
    frozen = config.adapter.kind is not AdapterKind.none
    dtype = DTYPES[config.train.precision.name] if frozen else torch.float32
    with _weightless():
        model = _described(config, dtype)
        model.config.use_cache = False
        if not (frozen and adapters):
            return model
        if config.adapter.base is not Frozen.full:
            on_gpu = config.cluster.train.gpus_per_node != 0
            quantized_linear.replace(blocks(model), config.adapter.base, dtype, on_gpu=on_gpu)
        return adapted(config, model)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in order: what is sharded, recomputed and compiled as one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            Problem(
                "model.source",
                type(model).__name__,
                "does not name its blocks (_no_split_modules), so it cannot be sharded",
            )
        )
    return found


def compute_dtype(config: Config) -> torch.dtype:
    return torch.float32 if config.train.precision is Precision.auto else DTYPES[config.train.precision.name]


@contextmanager
def _weightless() -> Iterator[None]:
    """Modules made meanwhile have parameters without data. Under `torch.device("meta")` buffers would lose theirs as well,
    and what a rotary embedding computed when it was made could only be guessed at afterwards."""
    register = nn.Module.register_parameter

    def onto_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = onto_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _described(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    shape = _shape(config) if config.model.init is Init.random else _stored_shape(config)
    before = embedding_resize.grow(shape, load_tokenizer(config), config)
    try:
        model = AutoModelForCausalLM.from_config(
            shape,
            dtype=dtype,
            attn_implementation=attention.chosen(config, shape),
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unloadable(config, error) from error
    if config.model.init is Init.pretrained:
        model.rows_before = before
        with suppress(OSError):  # most models have no generation_config.json
            model.generation_config = GenerationConfig.from_pretrained(config.model.source, revision=revision(config))
    return model


def _shape(config: Config) -> PreTrainedConfig:
    shape = config.model.architecture
    assert shape is not None  # launcher.check.rules
    fields = {name: value for name, value in vars(shape).items() if name not in ("model_type", "extra")}
    special = load_tokenizer(config)
    ids = {name: getattr(special, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(shape.model_type, **(fields | shape.extra | ids))


def _stored_shape(config: Config) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            config.model.source, revision=revision(config), trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unloadable(config, error) from error


def _unloadable(config: Config, error: Exception) -> ConfigError:
    return ConfigError(Problem("model.source", config.model.source, f"cannot be loaded: {first_line(error)}"))
