"""Selects the attention implementation, from the model, the GPU, the precision and whether rows are packed.

Two of the implementations are Muster's own (`jobs.model.attention_kernels`), registered with transformers at the end of
this file. Transformers builds no mask for a function without an entry in its table of mask functions
(`_preprocess_mask_arguments`). It also does not search `position_ids` for packed rows then, which would synchronize with the
GPU. The caller must therefore pass the sample boundaries of packed rows: `jobs.training.loss` does.
"""

import ast
import inspect
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from conf.choices import Attention, Precision
from conf.errors import ConfigError, Problem
from conf.packages import FLASH_ATTENTION
from conf.schema import Config
from jobs.distributed.log_once import log_once
from jobs.model import attention_kernels, block_sizes

NAMES = {Attention.cudnn: "muster_cudnn", Attention.varlen: "muster_varlen", Attention.flex: "flex_attention"}
"""`model.attention` -> the name in transformers, where the two differ."""

NO_ATTENTION, SOFTCAP, SINKS = "no heads", "softcap", "sinks"
KNOWN_ARGUMENTS = {
    *("query", "key", "value", "attention_mask", "dropout", "scaling", "sliding_window", "is_causal", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions"),
}
"""Arguments of attention functions that `attention_kernels.attend` takes, or that change nothing in a causal model."""


NO_ATTENTION = "no heads"
AMD = (0, 0)
"""Stands for AMD's GPUs: their numbers (9.0 is an MI200) say nothing about NVIDIA's kernels."""


def select(config: Config, model_config: PreTrainedConfig) -> str:
    """Return transformers' name of the attention implementation for this model, and log the choice once with its reason.

    Raises ConfigError if the config names an implementation that the model or this machine cannot run.
    """
    on_gpu = config.cluster.train.gpus_per_node != 0
    if on_gpu and not torch.cuda.is_available():
        return "eager"  # consolidation on a node without GPUs: it needs only the names and shapes of the weights
    choice = config.model.attention
    if choice is Attention.auto and config.parallel.context_ranks > 1:
        choice = Attention.varlen if config.data.packing else Attention.cudnn
        reason = "context parallelism exchanges heads between the ranks that share a row"
        if feature := _unsupported_feature(model_config):
            message = (
                f"does not work with this model: its attention has {feature}. "
                "Set parallel.context_ranks=1, and use more parallel.tensor_ranks or more nodes"
            )
            raise ConfigError(Problem("parallel.context_ranks", config.parallel.context_ranks, message))
    elif choice is Attention.auto:
        choice, reason = best_implementation(config, model_config, _capability() if on_gpu else None)
    else:
        reason = "set in the config"
        why_not = _why_wrong(choice, model_config) or _why_unavailable(
            config, choice, _unsupported_feature(model_config), on_gpu
        )
        if why_not:
            remedy = "set model.attention=auto, which selects the fastest one that works"
            raise ConfigError(Problem("model.attention", choice.name, f"{why_not}; {remedy}"))
    log_once(f"attention {choice.name}: {reason}")
    return NAMES.get(choice, choice.name)


def _capability() -> tuple[int, int]:
    return AMD if torch.version.hip else torch.cuda.get_device_capability()


def best_implementation(
    config: Config, model_config: PreTrainedConfig, capability: tuple[int, int] | None
) -> tuple[Attention, str]:
    """The implementation that `auto` selects, and the reason for the log.

    `capability` is the compute capability of the GPU, None on CPUs.
    """
    packed, half = config.data.packing, config.train.precision is not Precision.fp32
    feature = _unsupported_feature(model_config)
    if feature == NO_ATTENTION:
        return Attention.eager, "the model has no attention"
    if feature:
        return _with_feature(feature, _model_class(model_config), capability is not None, half)
    if capability is None:
        if packed:
            return Attention.varlen, "packed rows on CPUs, one sample after another"
        return Attention.sdpa, "the default on CPUs"
    if not half:
        return Attention.sdpa, "torch selects the kernel for fp32"
    if packed:
        return Attention.varlen, "packed rows, torch's kernel without a mask"
    if capability < (9, 0):
        gpu = "AMD's GPUs" if capability == AMD else f"compute capability {capability[0]}.{capability[1]}"
        return Attention.sdpa, f"torch's flash kernel on {gpu}"
    return Attention.cudnn, "the fastest on Hopper and later when each row holds one sample"


def _with_feature(feature: str, model_class: Any, on_gpu: bool, half: bool) -> tuple[Attention, str]:
    """The implementation for a model with this feature, and the reason."""
    if feature == SINKS and on_gpu and half:
        return Attention.varlen, "the model's attention has sinks, which Muster adds to torch's flash kernel"
    if feature != SOFTCAP and getattr(model_class, "_supports_sdpa", True):
        return Attention.sdpa, f"the model's attention has {feature}"
    return Attention.eager, f"the model's attention has {feature}, and needs memory for the square of a row's length"


def _unsupported_feature(model_config: PreTrainedConfig) -> str:
    """The first feature of the model's attention that `attention_kernels` does not compute, or an empty string."""
    text_config = model_config.get_text_config()
    model_class = _model_class(model_config)
    if model_class is None:
        return "custom code"
    if not block_sizes.has_attention(text_config):
        return NO_ATTENTION
    head_dims = block_sizes.all_values(text_config, "head_dim")
    if not any(head_dims):
        head_dims = [text_config.hidden_size // text_config.num_attention_heads]
    odd_head_dim = next((size for size in head_dims if size % 8 != 0 or size > 256), None)
    arguments = _arguments(model_class)
    unknown = sorted(arguments - KNOWN_ARGUMENTS - {"softcap", "s_aux"})
    features = {
        SOFTCAP: getattr(text_config, "attn_logit_softcapping", None) is not None,
        "custom code": not (model_class._supports_attention_backend and model_class._supports_flash_attn),
        "layer types other than full and sliding": not set(getattr(text_config, "layer_types", None) or ())
        <= {"full_attention", "sliding_attention"},
        "latent heads (MLA)": getattr(text_config, "kv_lora_rank", None) is not None,
        "dropout": bool(getattr(text_config, "attention_dropout", 0.0)),
        f"head size {odd_head_dim}": odd_head_dim is not None,  # limits of the cuDNN and flash kernels
        f"an argument {', '.join(unknown)}": bool(unknown),
        "value heads of another size": bool(set(block_sizes.all_values(text_config, "v_head_dim")) - set(head_dims)),
        SINKS: "s_aux" in arguments,
    }
    return next((name for name, present in features.items() if present), "")


def _model_class(model_config: PreTrainedConfig) -> Any:
    """The causal language model of this config in transformers, or None if its code is not there."""
    return AutoModelForCausalLM._model_mapping.get(type(model_config), None)


@cache
def _arguments(model_class: Any) -> set[str]:
    """The names of the arguments that the model passes to its attention function, read from its source."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    return {
        argument.arg
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface"
        for argument in node.keywords
        if argument.arg
    }


def _why_wrong(choice: Attention, model_config: PreTrainedConfig) -> str:
    """Why transformers' own code of this implementation computes something else for this model, or an empty string."""
    if choice is Attention.eager and model_config.model_type == "falcon" and model_config.alibi:
        return "adds the ALiBi bias of Falcon twice, to the scores and in the mask"
    return ""


def _why_unavailable(config: Config, choice: Attention, feature: str, on_gpu: bool) -> str:
    """Why the model or this machine cannot run the implementation, or an empty string.

    `feature` is the model's unsupported feature, from `_unsupported_feature`.
    """
    if choice in (Attention.sdpa, Attention.eager):
        return ""
    supported = ("", "dropout", SINKS) if choice is Attention.varlen else ("", "dropout")
    if choice in (Attention.cudnn, Attention.varlen) and feature not in supported:
        return f"does not support this model: its attention has {feature}"
    if choice is Attention.varlen:
        return ""
    if not on_gpu:
        return "runs on GPUs only"
    return _why_unavailable_on_gpu(config, choice)


def _why_unavailable_on_gpu(config: Config, choice: Attention) -> str:
    if choice is Attention.flex:
        return "" if find_spec("triton") else "needs the package triton, which is not installed"
    if config.train.precision is Precision.fp32:
        return "computes in bf16 only: set train.precision=bf16"
    if choice is Attention.cudnn and config.data.packing:
        return "does not separate the samples of packed rows"
    if choice in FLASH_ATTENTION and not _installed(FLASH_ATTENTION[choice]):
        return f"needs the package {FLASH_ATTENTION[choice].partition('.')[0]}, which is not installed"
    return ""


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the parent: find_spec("flash_attn.cute") imports flash_attn
        return False


# One function serves both: `jobs.training.loss` passes sample boundaries to varlen only.
for implementation in (Attention.cudnn, Attention.varlen):
    AttentionInterface.register(NAMES[implementation], attention_kernels.attend)
