"""Builds the model that the config describes: with or without weights, with or without adapters."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from conf.choices import AdapterKind, Frozen, Init, Precision
from conf.errors import ConfigError, Problem
from conf.families import FIXED_POSITIONS
from conf.schema import Config
from jobs.distributed.log_once import log_once
from jobs.model import attention, embedding_resize, materialize, multimodal, quantized_linear, stored_quantization
from jobs.model.lora import add_lora
from jobs.tensor_io.dtypes import PRECISIONS
from jobs.tokenization.tokenizer import load_tokenizer, revision, why_not_loaded

DTYPES = {name: dtype.torch for name, dtype in PRECISIONS.items()}
"""`train.precision` -> the dtype of compute."""
UNFIT = (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError, RuntimeError, StrictDataclassError)
"""What transformers raises for a config.json with values that its classes do not take."""


def build(config: Config) -> Any:
    """Return the whole model on the CPU: fp32 weights, or with an adapter a frozen base in the dtype of compute.

    Raises ConfigError if `model.source` cannot be loaded.
    """
    model = build_on_meta(config)
    materialize.materialize(model, lambda parameter: torch.empty_like(parameter, device="cpu"), torch.device("cpu"))
    parts = materialize.local_parts(model, lambda parameter: (parameter.shape, 0, parameter))
    materialize.fill(model, build_on_meta, parts, config)
    return model


def build_on_meta(config: Config, adapters: bool = True) -> Any:
    """Return the model without weights: parameters on the meta device, buffers with their values.

    `adapters=False` leaves out the adapters of the config. The embedding has a row for every token of the tokenizer, also
    for tokens that the stored model lacks. Raises ConfigError if `model.source` has no usable config.json.
    """
    frozen = config.adapter.kind is not AdapterKind.none
    dtype = DTYPES[config.train.precision.name] if frozen else torch.float32
    with _parameters_on_meta():
        model = _from_config(config, dtype)
        model.config.use_cache = False
        if not (frozen and adapters):
            return model
        if config.adapter.base is not Frozen.full:
            on_gpu = config.cluster.train.gpus_per_node != 0
            quantized_linear.replace_linears(blocks(model), config.adapter.base, dtype, on_gpu=on_gpu)
        return add_lora(config, model)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in order. Each is one unit of sharding, recomputation and compilation.

    Raises ConfigError for a model that does not name them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    # FSDP2 puts its name before that of a class
    decoder_blocks = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not decoder_blocks:
        raise ConfigError(
            Problem(
                "model.source",
                type(model).__name__,
                "does not name its decoder blocks in _no_split_modules, so it cannot be sharded: use another model class",
            )
        )
    return decoder_blocks


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of forward and backward. `auto` is fp32, as on CPUs; on GPUs `precision.settle` has replaced it."""
    return torch.float32 if config.train.precision is Precision.auto else DTYPES[config.train.precision.name]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules created inside this context have their parameters on the meta device and their buffers with values.

    `torch.device("meta")` would put the buffers there too. A rotary embedding computes its buffers when it is created,
    and nothing could restore them afterwards.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _from_config(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    is_random = config.model.init is Init.random
    model_config = _new_model_config(config) if is_random else _pretrained_model_config(config)
    quantization = stored_quantization.take_from(model_config, config)
    rows_before = embedding_resize.resize_vocabulary(model_config, load_tokenizer(config), config)
    try:
        model = _from_model_config(config, model_config, dtype)
    except ConfigError:
        raise
    except UNFIT as error:
        raise _unloadable(config, error) from error
    _check_positions(config, model)
    if config.model.init is Init.pretrained:
        model.rows_before = rows_before  # type: ignore[assignment] # embedding_resize reads it
        stored_quantization.attach(model, quantization)
        with suppress(OSError):  # most models have no generation_config.json
            model.generation_config = GenerationConfig.from_pretrained(config.model.source, revision=revision(config))
    return model


def _from_model_config(config: Config, model_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if multimodal.is_multimodal(model_config):
        return multimodal.build_text(
            model_config, config, lambda text_config: attention.select(config, text_config), dtype
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        model_config,
        dtype=dtype,
        attn_implementation=attention.select(config, model_config),
        trust_remote_code=config.model.trust_remote_code,
    )
    return model


def _check_positions(config: Config, model: PreTrainedModel) -> None:
    """Compare `data.max_length` with the positions that the model knows.

    Raises ConfigError if it has something stored for each of them. Where they are computed (rotary embeddings), it only logs.
    """
    text_config, wanted = model.config.get_text_config(), config.data.max_length
    names = ("max_position_embeddings", "max_seq_len")  # of most families, of MPT
    known = next((value for name in names if isinstance(value := getattr(text_config, name, None), int)), wanted)
    if known >= wanted:
        return
    is_learned = any(
        isinstance(module, nn.Embedding) and known <= module.num_embeddings <= known + 2
        for module in model.modules()
        if module is not model.get_input_embeddings()
    )
    if is_learned or text_config.model_type in FIXED_POSITIONS:
        message = f"the model has {known} positions, and none beyond them: set data.max_length={known}"
        raise ConfigError(Problem("data.max_length", wanted, message))
    log_once(f"positions: data.max_length={wanted} is more than {known}, for which the model was made (config.json)")


def _new_model_config(config: Config) -> PreTrainedConfig:
    """The config of a model with random weights, from `model.architecture`."""
    architecture = config.model.architecture
    assert architecture is not None  # launcher.check.rules refuses model.init=random without it
    fields = {
        name: value for name, value in vars(architecture).items() if name not in ("model_type", "tower_gib", "extra")
    }
    tokenizer = load_tokenizer(config)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(architecture.model_type, **(fields | architecture.extra | ids))


def _pretrained_model_config(config: Config) -> PreTrainedConfig:
    try:
        model_config: PreTrainedConfig = AutoConfig.from_pretrained(
            config.model.source, revision=revision(config), trust_remote_code=config.model.trust_remote_code
        )
        return model_config
    except UNFIT as error:
        raise _unloadable(config, error) from error


def _unloadable(config: Config, error: Exception) -> ConfigError:
    return ConfigError(Problem("model.source", config.model.source, why_not_loaded(error)))
