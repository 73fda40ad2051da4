"""Rules for keys that several programs have under different names."""

import json
import re
from collections.abc import Mapping
from typing import Any

from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, refused, unneeded

SOURCE = changed("model.source", "model=hub reads its config.json", also={"/model": "hub"})
EMBEDDING_RATE = refused("an adapter on embeddings learns with train.learning_rates={lora_embedding: RATE}")
FUSED = unneeded("Muster has a fused loss and compiles blocks")
SYSTEM = refused("write it into the rows, or into the chat template")


@described("`data.fields={system: TEXT}`")
def system_prompt(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """A system prompt for all chats, as a template of the row that is the same text for each."""
    if not value or not isinstance(value, str):
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    why = "rows with a system prompt of their own are refused beside it"
    return Row(key, value, Outcome.changed, {"data.fields": {"system": "{{ " + json.dumps(value) + " }}"}}, why)


STREAMING = refused("Muster tokenizes all rows before training, in a job without GPUs. Leave it away")
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
    "flash_attention_4": {"model.attention": "flash_attention_4"},
    "flash": {"model.attention": "auto"},
    "xformers": {"model.attention": "auto"},
    "flex": {"model.attention": "flex"},
    "eager": {"model.attention": "eager"},
    "disabled": {"model.attention": "eager"},
}
_ATTENTION = choice(ATTENTION, "Muster has model.attention=auto, sdpa, flex, eager, flash_attention_2 to 4")


@described("`model.attention`; a kernel of the Hub: `auto`")
def attention(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if "/" in str(value):
        why = "Muster loads no kernels from the Hub, and takes the fastest one that it has"
        return Row(key, value, Outcome.changed, {"model.attention": "auto"}, why)
    return _ATTENTION(key, value, config)


def flag(ours: Mapping[str, Any], off: Mapping[str, Any] | None = None) -> Rule:
    """`true` sets `ours`; `false` sets `off`, or nothing."""
    return choice({"true": ours, "false": off or {}}, "is true or false")


def targets(modules: str, parameters: str | None = None, linear: str | None = None) -> Rule:
    """What gets an adapter. A program may spread it over three keys: names of layers, names of weights, and all layers."""

    @described("`adapter.targets`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        names, why = layer_names(config.get(modules))
        if names is None:
            if key == modules:
                return Row(key, value, Outcome.refused, why=why)
            names = []
        every = names in (["all"], ["linear"], ["all-linear"]) or bool(linear and config.get(linear) in (True, "true"))
        weights = _listed(config.get(parameters) or []) if parameters else []
        if every:
            names = ["all-linear", *(name for name in names if name in BESIDE_BLOCKS)]
            if key == modules and linear and config.get(linear):
                return Row(key, value, Outcome.changed, why=f"{linear} counts")
        ours = {"adapter.targets": list(dict.fromkeys([*names, *weights]))}
        if key == linear and not every or not ours["adapter.targets"]:
            return Row(key, value, Outcome.unneeded, why="asks for nothing")
        return Row(
            key, value, Outcome.changed if why and key == modules else Outcome.kept, ours, why if key == modules else ""
        )

    return rule


BESIDE_BLOCKS = ("embed_tokens", "lm_head")
"""Layers that are not among all linear layers of the blocks."""
PLACES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "model.model.", "")
LAYERS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")),
    *(f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "out_proj")),
    *(
        f"{mlp}.{name}"
        for mlp in ("mlp", "feed_forward")
        for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
    ),
)
"""Usual names of linear layers in a decoder block."""


def layer_names(value: Any) -> tuple[list[str] | None, str]:
    """(names of layers, what to say about them). A regular expression becomes the usual names that it finds in every block.

    None for an expression that finds none of them, or not in every block.
    """
    names = value if isinstance(value, list) else str(value or "").replace(",", " ").split()
    if not any(sign in str(name) for name in names for sign in "(|*^$\\["):
        return [str(name) for name in names], ""
    refusal = "is a regular expression. List the names of the layers in adapter.targets"
    try:
        pattern = re.compile(str(value[0] if isinstance(value, list) and len(value) == 1 else value))
    except re.error:
        return None, refusal
    found = [
        [layer for layer in LAYERS if any(pattern.fullmatch(f"{place}layers.{block}.{layer}") for place in PLACES)]
        for block in (0, 1, 9, 23)
    ]
    if not found[0] or any(other != found[0] for other in found):
        return None, refusal
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in found[0])), "the layers that this expression finds"


ADAPTER_INIT = choice(
    {
        "true": {},
        **{name: {"adapter.init": name} for name in ("gaussian", "pissa", "olora")},
    },
    "Muster has adapter.init=default, gaussian, pissa (exact, without iterations) and olora",
)
EXACT_PISSA = "Muster computes the singular values exactly, without iterations"


@described("`adapter.init`; the iterations of `pissa_niter_N` become an exact decomposition")
def adapter_init(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """`init_lora_weights` of PEFT."""
    if str(value).lower().startswith("pissa_niter_"):
        return Row(key, value, Outcome.changed, {"adapter.init": "pissa"}, EXACT_PISSA)
    if value is False:
        return Row(
            key,
            value,
            Outcome.refused,
            why="B would not begin at zero. Muster has adapter.init=default, gaussian, pissa and olora",
        )
    return ADAPTER_INIT(key, value, config)


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


@described("`data.validation_fraction`; a number of rows: `data.validation_split`")
def held_out(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """A share of the rows, or a number of them, for which `reconcile` finds the set."""
    if 0 <= float(value) <= 0.5:
        return Row(key, value, Outcome.kept, {"data.validation_fraction": float(value)})
    if float(value) < 1:
        return Row(key, value, Outcome.refused, why="is more than half of the rows. Set data.validation_path")
    return Row(key, value, Outcome.changed, {HELD_OUT_ROWS: int(value)})


HELD_OUT_ROWS = "held-out rows"
"""Stands for a number of held-out rows until `reconcile` has seen the data sets."""


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
