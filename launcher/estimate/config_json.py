"""Reads the shape of a model from the fields of its config.json; pure."""

from collections.abc import Mapping
from typing import Any

from conf.schema import Architecture
from launcher.estimate.family_defaults import ALIASES, DEFAULTS

NAMED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings")  # fmt: skip
LISTS = ("mlp_only_layers", "moe_layers", "layer_types", "mlp_layer_types")
"""Fields that say for each layer what it is."""
SWITCHES = ("mlp_bias", "qk_layernorm", "use_qk_norm", "attention_out_bias", "lm_head_bias", "moe_layer_end_index",
            "new_decoder_architecture", "word_embed_proj_dim", "_remove_final_layer_norm", "num_ln_in_parallel_attn")  # fmt: skip
"""Fields that are 0, false or null where a family's defaults do not name them."""
KEPT = {*LISTS, *SWITCHES, *ALIASES, "full_attention_interval", "rope_scaling", "rope_parameters"} | {
    *NAMED,
    *(key for values in DEFAULTS.values() for key in values),
}
"""Fields that counting needs."""
UNREAD = {
    "falcon": ("intermediate_size", "num_key_value_heads"),
    **{family: ("num_key_value_heads",) for family in ("gpt2", "gpt_neox", "opt")},
}
"""Fields that a family does not read, although others do."""


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the model of text: `text_config` of a multimodal model, else all of it."""
    inner = fields.get("text_config") or fields.get("llm_config") or fields.get("language_config")
    return inner if isinstance(inner, dict) else fields


def architecture(fields: Mapping[str, Any]) -> Architecture | None:
    """The shape that config.json describes. None if it does not have the usual fields.

    Its `model_type` is that of the whole model, so that the text of a multimodal model is not counted as if it were all.
    """
    text, outer = text_fields(fields), fields.get("model_type")
    family = text.get("model_type", outer)
    if not isinstance(outer, str) or not isinstance(family, str):
        return None
    unread, defaults = UNREAD.get(family, ()), DEFAULTS.get(family, {})
    given = {name: value for name, value in text.items() if name in KEPT and name not in unread}
    values: dict[str, Any] = defaults | {ALIASES.get(name, name): value for name, value in given.items()}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if family in ("gpt2", "falcon") and values.get("intermediate_size") is None:
        values["intermediate_size"] = 4 * int(values["hidden_size"])
    if values.get("intermediate_size") is None:  # every layer has experts
        values["intermediate_size"] = values.get("moe_intermediate_size")
    numbers = {name: values.pop(name, None) for name in NAMED}
    if any(type(value) is not int or value < 1 for value in numbers.values()):
        return None
    tied = bool(values.pop("tie_word_embeddings", False))
    extra = {name: value for name, value in values.items() if defaults.get(name) != value}
    return Architecture(model_type=outer, tie_word_embeddings=tied, extra=extra, **numbers)


def positions(fields: Mapping[str, Any]) -> int | None:
    """Longest row that the model was made for, in tokens, after its rope scaling. None if config.json does not say."""
    text = text_fields(fields)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    longest = next((text[name] for name in names if type(text.get(name)) is int), 0)
    if longest < 1:
        return None
    made_for = longest
    for section in (text.get("rope_scaling"), text.get("rope_parameters")):
        nested = [value for value in section.values() if isinstance(value, dict)] if isinstance(section, dict) else []
        for scaling in [section, *nested] if isinstance(section, dict) else []:
            factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings") or made_for
            if isinstance(factor, int | float) and isinstance(original, int | float):
                longest = max(longest, int(factor * original))
    return longest


def positions_of(shape: Architecture) -> int:
    """The same for a shape."""
    return (
        positions({"max_position_embeddings": shape.max_position_embeddings} | shape.extra)
        or shape.max_position_embeddings
    )
