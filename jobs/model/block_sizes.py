"""Reads sizes of the decoder blocks from any model's config: some list a size per layer, some have no attention."""

from statistics import mean
from types import SimpleNamespace
from typing import Any

NO_ATTENTION = {"num_attention_heads": 1, "head_dim": 1, "num_key_value_heads": 1}


def all_values(text_config: Any, name: str) -> list[Any]:
    """The values of a field in all layers; empty if the config does not have it, or has None."""
    try:
        value = getattr(text_config, name, None)
    except RuntimeError:  # transformers raises it for a field that differs between layers
        return [getattr(layer, name) for layer in text_config.per_layer_config]
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def has_attention(text_config: Any) -> bool:
    """Whether the config has heads of attention: one of Mamba has none."""
    return bool(all_values(text_config, "num_attention_heads"))


class BlockSizes(SimpleNamespace):
    """Sizes of an average block, as whole numbers under the names that transformers gives them; what a config lacks is None.

    Without attention, they are those of one head of size 1: its cost is then almost nothing.
    """

    def get_text_config(self) -> "BlockSizes":
        """Itself: it can be used in place of a model's config."""
        return self


def of(model_config: Any) -> BlockSizes:
    """The sizes of a model's blocks."""
    text_config = model_config.get_text_config()
    fields: dict[str, int | None] = {}
    for name in ("hidden_size", "intermediate_size", "num_experts_per_tok", "num_hidden_layers", *NO_ATTENTION):
        numbers = [int(value) for value in all_values(text_config, name) if value]
        fields[name] = round(mean(numbers)) if numbers else None
    if not has_attention(text_config):
        fields.update(NO_ATTENTION)
    return BlockSizes(**fields)
