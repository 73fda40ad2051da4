"""Chooses how attention is computed: by what the model, the GPU, the precision and the rows allow.

Transformers makes no mask for functions without an entry in its table of mask functions (`_preprocess_mask_arguments`), such
as those of `jobs.model.attention_kernels`; nor does it then look for packed rows in `position_ids`, which would wait
for the GPU. So whoever
packs rows must pass their borders; `jobs.training.loss` does.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from conf.choices import Attention, Precision
from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.model import attention_kernels

log = logging.getLogger(__name__)

NAMES = {Attention.cudnn: "muster_cudnn", Attention.varlen: "muster_varlen", Attention.flex: "flex_attention"}
"""Transformers' names of the ways that are called otherwise in a config."""
PACKAGES = {
    Attention.flash_attention_2: "flash_attn",
    Attention.flash_attention_3: "flash_attn_interface",
    Attention.flash_attention_4: "flash_attn.cute",
}


def select(config: Config, shape: PreTrainedConfig) -> str:
    """Transformers' name of the attention to train a model of this shape with; says so once, with the reason.

    Raises ConfigError where the config asks for what this machine does not have.
    """
    on_gpu = config.cluster.train.gpus_per_node != 0
    if on_gpu and not torch.cuda.is_available():
        return "eager"  # a merge, on a node without GPUs: it looks at names and shapes only
    asked = config.model.attention
    if asked is Attention.auto and config.parallel.context_ranks > 1:
        asked = Attention.varlen if config.data.packing else Attention.cudnn
        reason = "heads are exchanged between the ranks that share a row"
        if odd := _odd(shape):
            said = f"cannot exchange the heads of a model whose attention has {odd}: take 1, and more tensor_ranks or nodes"
            raise ConfigError(Problem("parallel.context_ranks", config.parallel.context_ranks, said))
    elif asked is Attention.auto:
        asked, reason = best(config, shape, torch.cuda.get_device_capability() if on_gpu else None)
    else:
        reason = "as the config asks"
        if lacking := _lacking(config, asked, _odd(shape), on_gpu):
            advice = "model.attention=auto takes the best there is"
            raise ConfigError(Problem("model.attention", asked.name, f"{lacking}; {advice}"))
    _say(f"attention {asked.name}: {reason}")
    return NAMES.get(asked, asked.name)


def best(config: Config, shape: PreTrainedConfig, capability: tuple[int, int] | None) -> tuple[Attention, str]:
    """The way that `auto` takes, and why; `capability` is the GPU's, None on CPUs."""
    packed, half = config.data.packing, config.train.precision is not Precision.fp32
    odd = _odd(shape)
    if odd in ("softcap", "sinks"):
        if capability and find_spec("triton"):
            return Attention.flex, f"the model's attention has {odd}, which torch's other kernels lack"
        return Attention.eager, f"the model's attention has {odd}, which torch's kernels lack"
    if odd:
        return Attention.sdpa, f"the model's attention has {odd}"
    if capability is None:
        return (Attention.varlen, "packed rows, sample by sample on CPUs") if packed else (Attention.sdpa, "on CPUs")
    if not half:
        return Attention.sdpa, "kernels for fp32 are chosen by torch"
    if packed:
        return Attention.varlen, "packed rows, by torch's own kernel without a mask"
    if capability < (9, 0):
        return Attention.sdpa, f"torch's flash kernel for compute capability {capability[0]}.{capability[1]}"
    return Attention.cudnn, "the fastest for a sample a row on Hopper and later"


def _odd(shape: PreTrainedConfig) -> str:
    """What of a model's attention the two ways of this file do not compute; empty where they compute all of it."""
    text = shape.get_text_config()
    try:
        kind = AutoModelForCausalLM._model_mapping[type(shape)]
    except KeyError:
        return "code of its own"
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    found = {
        "softcap": getattr(text, "attn_logit_softcapping", None) is not None,
        "sinks": not kind._supports_sdpa,
        "code of its own": not (kind._supports_attention_backend and kind._supports_flash_attn),
        "layers of other kinds": not set(getattr(text, "layer_types", None) or ())
        <= {"full_attention", "sliding_attention"},
        "latent heads": getattr(text, "kv_lora_rank", None) is not None,
        "dropout": bool(getattr(text, "attention_dropout", 0.0)),
        f"heads of {head}": head % 8 != 0 or head > 256,
    }
    return next((name for name, present in found.items() if present), "")


def _lacking(config: Config, asked: Attention, odd: str, on_gpu: bool) -> str:
    """Why the model, or this machine, cannot do what is asked; empty where it can."""
    if asked in (Attention.sdpa, Attention.eager):
        return ""
    if asked in (Attention.cudnn, Attention.varlen) and odd not in ("", "dropout"):
        return f"does not compute the model's attention, which has {odd}"
    if asked is Attention.varlen:
        return ""
    if not on_gpu:
        return "trains on GPUs only"
    return _missing(config, asked)


def _missing(config: Config, asked: Attention) -> str:
    """Why it cannot be done on a GPU."""
    if asked is Attention.flex:
        return "" if find_spec("triton") else "needs triton, which is not installed"
    if config.train.precision is Precision.fp32:
        return "computes in bf16 only: set train.precision=bf16"
    if asked is Attention.cudnn and config.data.packing:
        return "does not keep the samples of packed rows apart"
    if asked in PACKAGES and not _installed(PACKAGES[asked]):
        return f"needs the package {PACKAGES[asked].partition('.')[0]}, which is not installed"
    return ""


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@cache
def _say(line: str) -> None:
    """Once a process, and on the first rank alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info(line)


for way in (Attention.cudnn, Attention.varlen):  # `jobs.training.loss` gives the borders of samples to the second alone
    AttentionInterface.register(NAMES[way], attention_kernels.attend)
