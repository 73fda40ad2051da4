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
            "new_decoder_architecture", "num_ln_in_parallel_attn")  # fmt: skip
"""Fields that are 0, false or null where a family's defaults do not name them."""
KEPT = {*LISTS, *SWITCHES, *ALIASES, "full_attention_interval", *(key for values in DEFAULTS.values() for key in values)}
"""Fields that counting needs."""
UNREAD = {
    "falcon": ("intermediate_size", "num_key_value_heads"),
    **{family: ("num_key_value_heads",) for family in ("gpt2", "gpt_neox", "opt")},
}
"""Fields that a family does not read, although others do."""
OTHER_PARTS = ("vision_config", "audio_config", "speech_config", "encoder", "decoder")
"""Sections of config.json of models that have more than a decoder of text."""


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the model of text: `text_config` of a multimodal model, else all of it."""
    inner = fields.get("text_config") or fields.get("llm_config") or fields.get("language_config")
    return inner if isinstance(inner, dict) else fields


def architecture(fields: Mapping[str, Any]) -> tuple[Architecture | None, str | None]:
    """The shape that config.json describes, or None and why it cannot be read."""
    family = fields.get("model_type")
    if not isinstance(family, str):
        return None, "its config.json has no model_type"
    parts = [part for part in OTHER_PARTS if fields.get(part)]
    if parts or text_fields(fields) is not fields:
        return None, f"model_type={family} has more parts than text ({', '.join(parts) or 'text_config'})"
    if family not in DEFAULTS:
        return None, f"model_type={family} is a family that Muster cannot count"
    unread = UNREAD.get(family, ())
    given = {name: value for name, value in fields.items() if name in KEPT and name not in unread}
    values = DEFAULTS[family] | {ALIASES.get(name, name): value for name, value in given.items()}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if family in ("gpt2", "falcon") and values.get("intermediate_size") is None:
        values["intermediate_size"] = 4 * int(values["hidden_size"])
    if family == "qwen3_5_moe_text":
        values.setdefault("intermediate_size", values["moe_intermediate_size"])
    numbers = {name: values.pop(name, None) for name in NAMED}
    if wrong := [name for name, value in numbers.items() if type(value) is not int or value < 1]:
        return None, f"its config.json does not say {', '.join(wrong)} as a whole number"
    tied = bool(values.pop("tie_word_embeddings", False))
    extra = {name: value for name, value in values.items() if DEFAULTS[family].get(name) != value or name in fields}
    return Architecture(model_type=family, tie_word_embeddings=tied, extra=extra, **numbers), None
