"""Builds tokenizer and model from the config: pretrained or with fresh weights, with or without adapters."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conf.errors import ConfigError, DataError, Problem
from conf.schema import AdapterKind, Attention, Config, Init, Precision
from jobs.templates import template_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Raises DataError when there is no tokenizer in `model.tokenizer` or `model.source`, or it cannot pad."""
    source = config.model.tokenizer or config.model.source
    try:
        found = AutoTokenizer.from_pretrained(
            source, revision=_revision(config), trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(Problem("model.tokenizer", source, f"cannot be loaded: {_first_line(error)}")) from error
    if config.data.chat_template:
        try:
            found.chat_template = template_text(config.data.chat_template, found)
        except ValueError as error:
            raise DataError(Problem("data.chat_template", config.data.chat_template, str(error))) from error
    if found.pad_token_id is None:
        found.pad_token = found.eos_token
    return found


def build(config: Config) -> PreTrainedModel:
    """The model to train, on the CPU: fp32 master weights, or under an adapter a frozen base in the precision of compute.

    Raises ConfigError when the source cannot be loaded.
    """
    frozen = config.adapter.kind is not AdapterKind.none
    dtype = DTYPES[config.train.precision.name] if frozen else torch.float32
    torch.manual_seed(config.train.seed)
    model = _fresh(config, dtype) if config.model.init is Init.random else _pretrained(config, dtype)
    model.config.use_cache = False
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted(config, model) if frozen else model


def adapted(config: Config, model: PreTrainedModel) -> Any:
    """The model with a PEFT LoRA: fp32 adapters on a frozen base."""
    from peft import LoraConfig, get_peft_model

    adapter = config.adapter
    targets = "all-linear" if adapter.targets == ["all-linear"] else list(adapter.targets)
    plan = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, plan)
    except ValueError as error:
        raise ConfigError(Problem("adapter.targets", adapter.targets, _first_line(error))) from error
    if config.train.activation_checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


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
    return torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32


def _fresh(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    shape = config.model.architecture
    assert shape is not None  # launcher.checks
    fields = {name: value for name, value in vars(shape).items() if name not in ("model_type", "extra")}
    described = AutoConfig.for_model(shape.model_type, **fields, **shape.extra)
    special = tokenizer(config)
    described.bos_token_id, described.eos_token_id, described.pad_token_id = (
        special.bos_token_id,
        special.eos_token_id,
        special.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(described, dtype=dtype, attn_implementation=_attention(config))


def _pretrained(config: Config, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            config.model.source,
            revision=_revision(config),
            trust_remote_code=config.model.trust_remote_code,
            dtype=dtype,
            attn_implementation=_attention(config),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem("model.source", config.model.source, f"cannot be loaded: {_first_line(error)}")
        ) from error


def _attention(config: Config) -> str:
    return "sdpa" if config.model.attention is Attention.auto else config.model.attention.name


def _revision(config: Config) -> str:
    return config.model.revision or "main"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
