"""Rules for keys that several programs have under different names."""

from collections.abc import Mapping
from typing import Any

from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, refused, unneeded

SOURCE = changed("model.source", "model=hub reads its config.json", also={"/model": "hub"})
EMBEDDING_RATE = refused("an adapter on embeddings learns with train.learning_rates={lora_embedding: RATE}")
FUSED = unneeded("Muster has a fused loss and compiles blocks")
SYSTEM = refused("write it into the rows, or into the chat template")
STREAMING = refused("Muster tokenizes all rows before training")
NO_EFFECT = unneeded("has no effect on what is trained")
ATTENTION: dict[str, dict[str, Any]] = {
    "auto": {"model.attention": "auto"},
    "fa2": {"model.attention": "flash_attention_2"},
    "fa3": {"model.attention": "flash_attention_3"},
    "flash_attn": {"model.attention": "auto"},
    "flash_attention_2": {"model.attention": "flash_attention_2"},
    "flash_attention_3": {"model.attention": "flash_attention_3"},
    "flex_attention": {"model.attention": "flex"},
    "sdpa": {"model.attention": "sdpa"},
    "eager": {"model.attention": "eager"},
    "disabled": {"model.attention": "eager"},
}
attention = choice(ATTENTION, "Muster has model.attention=auto, sdpa, flex, eager, flash_attention_2 to 4")


def flag(ours: Mapping[str, Any], off: Mapping[str, Any] | None = None) -> Rule:
    """`true` sets `ours`; `false` sets `off`, or nothing."""
    return choice({"true": ours, "false": off or {}}, "is true or false")


@described("`adapter.targets`")
def targets(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """Names of layers as a list, or in one text with commas or blanks."""
    names = value if isinstance(value, list) else str(value).replace(",", " ").split()
    if any(sign in name for name in names for sign in "(|*^$\\"):
        why = "is a regular expression. List the names of the layers in adapter.targets"
        return Row(key, value, Outcome.refused, why=why)
    every = names in (["all"], ["linear"], ["all-linear"])
    return Row(key, value, Outcome.kept, {"adapter.targets": ["all-linear"] if every else names})


ADAPTER_INIT = choice(
    {
        "true": {},
        **{name: {"adapter.init": name} for name in ("gaussian", "pissa", "olora")},
        **{f"pissa_niter_{count}": {"adapter.init": "pissa"} for count in (1, 2, 4, 8, 16, 32)},
    },
    "Muster has adapter.init=default, gaussian, pissa (exact, without iterations) and olora",
)
"""`init_lora_weights` of PEFT."""


@described("`adapter.modules_to_save`")
def saved_modules(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if not (names := _listed(value)):
        return Row(key, value, Outcome.unneeded, why="names no layer")
    return Row(key, value, Outcome.kept, {"adapter.modules_to_save": names})


@described("`adapter.source`")
def adapter_source(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """The folder of an adapter to go on from."""
    names = _listed(value)
    if len(names) != 1 or config.get("create_new_adapter"):
        why = "Muster goes on from one adapter. Merge the others into their base, and use that as model.source"
        return Row(key, value, Outcome.refused, why=why)
    return Row(key, value, Outcome.kept, {"adapter.source": names[0]})


def _listed(value: Any) -> list[str]:
    """Names as a list, or in one text with commas."""
    return value if isinstance(value, list) else [name.strip() for name in str(value).split(",") if name.strip()]


@described("`adapter.layers_to_transform`")
def layers(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """The number of a block, or a list of them."""
    numbers = value if isinstance(value, list) else [value]
    return Row(key, value, Outcome.kept, {"adapter.layers_to_transform": [int(number) for number in numbers]})


@described("`data.validation_fraction`")
def held_out(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """A share of the rows; a number of rows has no counterpart."""
    if float(value) < 1:
        return Row(key, value, Outcome.kept, {"data.validation_fraction": float(value)})
    why = f"is a number of rows. Set data.validation_fraction, or data.validation_path and data.validation_split='[:{int(value)}]'"
    return Row(key, value, Outcome.refused, why=why)


@described("`data.special_tokens`")
def tokens(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """New tokens as a list, or in one text with commas."""
    names = value if isinstance(value, list) else str(value).split(",")
    return Row(key, value, Outcome.kept, {"data.special_tokens": names})


@described("`data.chat_template`; null: the tokenizer's own")
def template(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """The name of a chat template."""
    if value in ("chatml", "llama3", "qwen", "gemma", "mistral"):
        return Row(key, value, Outcome.changed, {"data.chat_template": value}, "Muster's own template of that name")
    why = "the tokenizer's own chat template is used. If it has none: data.chat_template=FILE.jinja"
    return Row(key, value, Outcome.changed, why=why)
