"""Makes tiny models of the same family from any model's config, for trials before the real weights are loaded."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

VOCABULARY = 64
MANY_HEADS = 16
MAX_WIDTH = 256
"""Of widths that need not fit the others, like those inside an MLP."""
WINDOW = 4
"""Tokens of a sliding window or chunk of attention: fewer than a sample of the trial has, so that it matters."""

_HEADS = re.compile(
    r"^(num_attention_heads|(n|num)_heads?|(mamba_|n_mamba_|linear_num_(key|value)_|linear_num_|mamba_num_|mamba_n_)heads)$"
)
_KEY_HEADS = re.compile(r"^((swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads)$")
_EXACT_WIDTH = re.compile(
    r"^(hidden_size|n_embd|d_model|lru_width|mamba_d_ssm|word_embed_proj_dim|attention_hidden_size)$"
)
_WIDTH = re.compile(
    r"^((\w+_)?intermediate_size(_mlp)?|ffn_(dim|hidden_size)|n_inner|(kv|q|o)_lora_rank|adapter_rank|block_ff_dim"
    r"|hidden_size_per_layer_input|time_step_rank|mamba_dt_rank)$"
)
_LIMITS = {
    re.compile(r"^vocab_size"): VOCABULARY,
    re.compile(r"^((moe_)?num_(local_)?experts|n_routed_experts)$"): 4,
    re.compile(r"^(num_experts_per_tok(en)?|moe_k|moe_top_k|top_k_experts)$"): 2,
    re.compile(r"^(sliding_window|attention_window_size|window_size|attention_chunk_size|index_topk)$"): WINDOW,
    re.compile(r"^(n_groups?|mamba_n_groups|topk_group)$"): 1,
}
_RANDOM = re.compile(r"dropout|_pdrop$|jitter")
_PERIOD = re.compile(r"period|offset|pattern|(?<!time_)step|ind(ex|ic)|idx|freq|interval|first_k|skip|start")
"""Settings that say which layers are of which kind, except for the lists."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def configs(original: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Configs of the same family with fewer heads and smaller widths, the smallest first; the last has the original widths.

    Sizes of heads, kinds of layers and all other settings stay. All have a small vocabulary, few experts, and neither dropout
    nor noise. A family may not build with some of them, because its widths depend on each other: try the next one then.
    """
    values = original.to_dict()
    heads = next((_number(values[name]) for name in ("num_attention_heads", "n_head", "n_heads") if name in values), 0)
    hidden = next((_number(values[name]) for name in ("hidden_size", "n_embd", "d_model") if name in values), 64)
    divisors = [Fraction(part, heads) for part in range(1, heads + 1) if heads % part == 0] if heads else []
    scales = [scale for scale in divisors if scale >= Fraction(2, heads)]
    if not scales or scales[0] * heads > MANY_HEADS:  # their number has no small divisor: take one
        scales = divisors[:1] + scales
    scales += [] if heads else [Fraction(1, part) for part in (64, 32, 16, 8, 4, 2, 1) if hidden % part == 0]
    layers = _layers(values)
    for scale in scales:
        smaller = _scaled(values, scale, layers)
        if smaller is None:
            continue
        try:
            config = type(original).from_dict(smaller)
        except (ValueError, TypeError, KeyError):  # this class checks how its fields fit together
            continue
        yield config


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give a tiny model random weights that keep activations near 1, so that a difference in what is computed is not small."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            fan_in = weight[0].numel() if weight.ndim == 2 or "conv" in name else weight.shape[-1]
            weight.normal_(0, 1.0 if "embed" in name else fan_in**-0.5)
        else:
            weight.add_(torch.randn_like(weight) * 0.05)


def _number(value: Any) -> int:
    return int(max(value) if isinstance(value, list) else value)


def _layers(values: dict[str, Any]) -> tuple[int, int] | None:
    """(layers, layers that are enough to have each kind once); None if the config says the kinds in another way."""
    count, kinds = values.get("num_hidden_layers"), values.get("layer_types")
    if not isinstance(count, int) or values.get("num_kv_shared_layers") or values.get("per_layer_config"):
        return None
    per_layer = [item for item in values.values() if isinstance(item, list) and len(item) == count > 2]
    if not isinstance(kinds, list):
        is_uniform = not per_layer and not any(_PERIOD.search(name) and value for name, value in values.items())
        return (count, min(count, 2)) if is_uniform else None
    combined = list(map(str, zip(*per_layer, strict=True)))
    return count, min(count, max([2, *(combined.index(kind) + 1 for kind in set(combined))]))


def _scaled(values: dict[str, Any], scale: Fraction, layers: tuple[int, int] | None) -> dict[str, Any] | None:
    """The fields of the smaller config; None if a number of heads or a width would not be whole."""
    smaller = dict(values)
    for name, value in values.items():
        if layers and isinstance(value, list) and len(value) == layers[0] > layers[1]:
            value = value[: layers[1]]
        if isinstance(value, dict) and name in ("attn_config", "ffn_config"):
            value = _scaled(value, scale, None)
            if value is None:
                return None
        elif isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            new = [_field(name, item, scale) for item in value]
            if None in new:
                return None
            value = new
        else:
            value = _field(name, value, scale)
            if value is None and values[name] is not None:
                return None
        smaller[name] = value
    if layers:
        smaller["num_hidden_layers"] = min(layers)
    return smaller


def _field(name: str, value: Any, scale: Fraction) -> Any:
    """The value of a field in the smaller config; None for one that would not be whole."""
    if isinstance(value, float) and _RANDOM.search(name):
        return 0.0
    if name in _TOKENS:
        return _TOKENS[name]
    is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return _size(name, value, scale) if is_size else value


def _size(name: str, value: int, scale: Fraction) -> int | None:
    if _HEADS.match(name) or _EXACT_WIDTH.match(name):
        return int(value * scale) if (value * scale).denominator == 1 else None
    if _KEY_HEADS.match(name):
        return max(1, int(value * scale)) if value * scale < 1 or (value * scale).denominator == 1 else None
    if _WIDTH.match(name):
        return min(value, MAX_WIDTH, max(8, -(-int(value * scale) // 8) * 8))
    limit = next((limit for pattern, limit in _LIMITS.items() if pattern.match(name)), value)
    return min(value, limit)
