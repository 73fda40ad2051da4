"""Refuses attention kernels, and rows that ranks share, for models whose attention they do not compute; pure.

`jobs.model.attention` says the same when training starts, also for what only the model's code shows.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from conf.choices import Attention
from conf.errors import Problem
from conf.schema import Config
from launcher.estimate.config_json import text_fields
from launcher.estimate.family_defaults import DEFAULTS

SOFTCAPPED = frozenset({"gemma2", "vaultgemma"})
"""Families that cap the scores of tokens unless config.json says null."""
WITH_SINKS = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})
PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention"})
LONGEST_HEAD = 256
SINKS, DROPOUT = "sinks", "dropout"


def problems(config: Config, fields: Mapping[str, Any] | None) -> Iterator[Problem]:
    """What `model.attention` or `parallel.context_ranks` cannot compute. `fields` is the model's config.json, if it is known."""
    found = feature(config, fields or {})
    if "train" not in config.jobs or not found:
        return
    kernel = config.model.attention
    if kernel is Attention.auto and config.parallel.context_ranks > 1:
        message = (
            f"does not work with this model: its attention has {found}. "
            "Set parallel.context_ranks=1, and use more parallel.tensor_ranks or more nodes"
        )
        yield Problem("parallel.context_ranks", config.parallel.context_ranks, message)
    computed = {Attention.cudnn: (DROPOUT,), Attention.varlen: (DROPOUT, SINKS)}
    if found not in computed.get(kernel, (found,)):
        message = f"does not support this model: its attention has {found}. Set model.attention=auto, which selects the fastest one"
        yield Problem("model.attention", kernel.name, f"{message} that works")


def feature(config: Config, fields: Mapping[str, Any]) -> str:
    """The first feature of the model's attention that Muster's kernels lack, as far as the config shows it; else ""."""
    shape, text = config.model.architecture, text_fields(fields)
    if shape is None:
        return ""
    family = shape.model_type
    values = {**DEFAULTS.get(family, {}), **shape.extra, **text}
    head = values.get("head_dim")
    if head is None and family in DEFAULTS:
        head = shape.hidden_size // max(1, shape.num_attention_heads)
    layers = values.get("layer_types") or (["linear_attention"] if "linear_num_key_heads" in values else [])
    features = {
        "softcap": values.get("attn_logit_softcapping", 50 if family in SOFTCAPPED else None) is not None,
        "layer types other than full and sliding": not set(layers) <= PLAIN_LAYERS,
        "latent heads (MLA)": values.get("kv_lora_rank") is not None,
        DROPOUT: bool(values.get("attention_dropout")),
        f"head size {head}": isinstance(head, int) and (head % 8 != 0 or head > LONGEST_HEAD),
        SINKS: family in WITH_SINKS,
    }
    return next((name for name, present in features.items() if present), "")
