"""Reads the shape of a model from the fields of its config.json; pure."""

from collections.abc import Mapping
from typing import Any

from conf.schema_model import Architecture
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

TEXT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {
        "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    }),
    "qwen3_vl_text": ("qwen3", {"max_position_embeddings": 128000}),
    "qwen3_vl_moe_text": ("qwen3_moe", {
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 128000, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "num_experts": 60,
    }),
}  # fmt: skip
"""Texts of multimodal models that have the layers of another family -> that family, and defaults that differ from it."""
TEXT_FAMILIES["qwen2_5_vl_text"] = TEXT_FAMILIES["qwen2_vl_text"]
TEXTS = {
    **{family: f"{family}_text" for family in ("gemma3", "gemma3n", "gemma4", "llama4", "qwen3_5", "qwen3_5_moe")},
    **{
        family: f"{family}_text"
        for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe")
    },
}
"""Families of multimodal models -> that of their text, which their config.json need not say."""


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the model of text: `text_config` of a multimodal model, else all of it."""
    inner = fields.get("text_config") or fields.get("llm_config") or fields.get("language_config")
    return inner if isinstance(inner, dict) else fields


def is_multimodal(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json describes more than a model of text."""
    return fields.get("model_type") in TEXTS or text_fields(fields) is not fields


def text_family(fields: Mapping[str, Any]) -> str | None:
    """`model_type` of the model of text."""
    outer = fields.get("model_type")
    family = TEXTS.get(str(outer)) or text_fields(fields).get("model_type", outer)
    return family if isinstance(family, str) else None


def architecture(fields: Mapping[str, Any]) -> Architecture | None:
    """The shape that config.json describes: of a multimodal model, that of its text. None if it lacks the usual fields."""
    text, family = text_fields(fields), text_family(fields)
    if family is None or not isinstance(fields.get("model_type"), str):
        return None
    family, own_defaults = TEXT_FAMILIES.get(family, (family, {}))
    unread, defaults = UNREAD.get(family, ()), DEFAULTS.get(family, {})
    given = {name: value for name, value in text.items() if name in KEPT and name not in unread}
    if "tie_word_embeddings" in fields:  # a multimodal model is tied as it says itself
        given["tie_word_embeddings"] = fields["tie_word_embeddings"]
    values: dict[str, Any] = defaults | own_defaults | {ALIASES.get(name, name): value for name, value in given.items()}
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
    return Architecture(model_type=family, tie_word_embeddings=tied, extra=extra, **numbers)


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
