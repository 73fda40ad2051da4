"""Rules for the YAML files of TRL's `sft`: its script arguments, SFTConfig and ModelConfig."""

from collections.abc import Mapping
from typing import Any

from launcher.convert import trainer_keys
from launcher.convert.common_rules import (
    FUSED,
    NO_EFFECT,
    SOURCE,
    STREAMING,
    attention,
    flag,
    held_out,
    saved_modules,
    targets,
)
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, kept, number, refused, unneeded

MARKERS = {
    "dataset_name", "dataset_config", "dataset_train_split", "model_name_or_path", "use_peft", "assistant_only_loss",
    "completion_only_loss", "dataset_text_field", "lora_target_modules", "datasets",
}  # fmt: skip
"""Keys by which a file of TRL is recognized."""
FIXED: dict[str, Any] = {
    "train.learning_rate": 2e-5,
    "train.activation_checkpointing": "full",
    "data.max_length": 1024,
    "data.validation_fraction": 0.0,
    "adapter.r": 16,
    "adapter.alpha": 32.0,
    "adapter.dropout": 0.05,
    "adapter.targets": ["q_proj", "v_proj"],
}
"""Defaults of TRL and, for the layers of an adapter, of PEFT for Llama, Mistral, Qwen and Gemma."""


def defaults(config: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Defaults of TRL that differ from Muster's, under Muster's keys."""
    found = trainer_keys.defaults(config, gpus, micro=8) | FIXED
    if not config.get("assistant_only_loss") and config.get("completion_only_loss") is None:
        why = "as TRL trains on chats. Of rows with prompt and completion it trains on the completion: data.mask=assistant"
        found["data.mask"] = Row("default: data.mask", "all", Outcome.changed, {"data.mask": "all"}, why)
    evaluates = config.get("eval_strategy") not in (None, False, "no")
    if evaluates and config.get("dataset_name") and not config.get("dataset_test_split"):
        found["data.validation_path"] = f"{config['dataset_name']}:test"
    return found


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for a training on `gpus` GPUs."""
    return {
        **trainer_keys.rules(gpus),
        "gradient_checkpointing_kwargs": trainer_keys.reentrant(by_default=True),
        "model_name_or_path": SOURCE,
        "model_revision": kept("model.revision"),
        "trust_remote_code": kept("model.trust_remote_code"),
        "dtype": unneeded("Muster reads any dtype; train.precision is that of compute"),
        "torch_dtype": unneeded("Muster reads any dtype; train.precision is that of compute"),
        "attn_implementation": attention,
        "use_peft": flag({"/adapter": "lora"}, {"/adapter": "none"}),
        "lora_r": kept("adapter.r"),
        "lora_alpha": number("adapter.alpha"),
        "lora_dropout": number("adapter.dropout"),
        "lora_target_modules": TARGETS,
        "lora_target_parameters": TARGETS,
        "lora_modules_to_save": saved_modules,
        "lora_task_type": NO_EFFECT,
        "use_rslora": flag({"adapter.rslora": True}),
        "use_dora": flag({"adapter.dora": True}),
        "load_in_4bit": flag({"adapter.base": "nf4"}),
        "load_in_8bit": flag({"adapter.base": "int8"}),
        "bnb_4bit_quant_type": choice({"nf4": {}}, "Muster stores 4 bits as nf4"),
        "use_bnb_nested_quant": unneeded("Muster always quantizes the scales of nf4 too"),
        "dataset_name": _dataset,
        "dataset_config": kept("data.subset"),
        "dataset_train_split": unneeded("is part of data.path=NAME:SPLIT"),
        "dataset_test_split": _test_split,
        "dataset_streaming": STREAMING,
        "datasets": _mixture,
        "test_split_size": held_out,
        "dataset_text_field": _text_field,
        "dataset_num_proc": kept("data.workers"),
        "dataset_kwargs": refused("Muster always tokenizes, and adds special tokens once"),
        "max_length": kept("data.max_length"),
        "max_seq_length": kept("data.max_length"),
        "packing": kept("data.packing"),
        "packing_strategy": choice({"bfd": {}, "bfd_split": {"data.overlong": "split"}}, "Muster packs whole samples"),
        "padding_free": unneeded("data.packing=true does it; the samples of a row are kept apart"),
        "eval_packing": unneeded("held-out rows are never packed; their loss is the same"),
        "pad_to_multiple_of": NO_EFFECT,
        "pad_token": kept("data.pad_token"),
        "eos_token": kept("data.eos_token"),
        "chat_template_path": changed("data.chat_template", "a Jinja file"),
        "assistant_only_loss": flag({"data.mask": "assistant"}, {"data.mask": "all"}),
        "completion_only_loss": flag({}, {"data.mask": "all"}),
        "shuffle_dataset": flag({}),
        "loss_type": choice({"nll": {}, "chunked_nll": {}}, "Muster minimizes the cross entropy"),
        "activation_offloading": flag({"train.activation_checkpointing": "offload"}),
        "use_liger": FUSED,
        "model_init_kwargs": refused("set model.revision, model.attention and model.trust_remote_code"),
        "router_aux_loss_coef": refused("set router_aux_loss_coef and output_router_logits in config.json of the model"),
        "truncation_mode": choice({"keep_start": {}}, "Muster has data.overlong=truncate (keeps the start), split, drop and error"),
        "bnb_4bit_quant_storage": NO_EFFECT,
        "ignore_bias_buffers": NO_EFFECT,
    }  # fmt: skip


TARGETS = targets("lora_target_modules", "lora_target_parameters")


@described("`data.fields={text: COLUMN}`")
def _text_field(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    return Row(key, value, Outcome.kept, {} if value == "text" else {"data.fields": {"text": value}})


@described("`data.path`")
def _dataset(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    split = config.get("dataset_train_split") or "train"
    path = value if split == "train" else f"{value}:{split}"
    return Row(key, value, Outcome.kept, {"/data": "jsonl", "data.name": str(value).split("/")[-1], "data.path": path})


@described("`data.validation_path=NAME:SPLIT`")
def _test_split(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if str(config.get("eval_strategy") or "no") == "no" or not config.get("dataset_name"):
        return Row(key, value, Outcome.unneeded, why="eval_strategy is no")
    return Row(
        key, value, Outcome.changed, {"data.validation_path": f"{config['dataset_name']}:{value}"}, "held-out rows"
    )


@described("`data.sets`")
def _mixture(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """`datasets` of a mixture: path, name, data_files, split."""
    sets = {}
    for index, item in enumerate(value):
        ours = {"path": item["path"] + (f":{item['split']}" if item.get("split", "train") != "train" else "")}
        if item.get("name"):
            ours["subset"] = item["name"]
        if files := item.get("data_files"):
            ours["files"] = files if isinstance(files, list) else [files]
        if unknown := set(item) - {"path", "name", "data_files", "split", "columns", "data_dir"}:
            return Row(key, value, Outcome.refused, why=f"{', '.join(sorted(unknown))} of a set has no counterpart")
        sets[f"set{index}"] = ours
    return Row(key, value, Outcome.kept, {"/data": "mix", "data.sets": sets})
