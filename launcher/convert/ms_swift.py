"""Rules for the YAML files of ms-swift (`swift sft --config`)."""

from collections.abc import Mapping
from typing import Any

from launcher.convert import trainer_keys
from launcher.convert.common_rules import (
    ADAPTER_INIT,
    SOURCE,
    STREAMING,
    SYSTEM,
    adapter_source,
    attention,
    flag,
    held_out,
    saved_modules,
    targets,
    template,
    tokens,
)
from launcher.convert.keys import Outcome, Row, Rule, choice, described, kept, number, refused, unneeded

MARKERS = {
    "tuner_type",
    "train_type",
    "split_dataset_ratio",
    "target_modules",
    "model",
    "loss_scale",
    "torch_dtype",
    "num_labels",
}
"""Keys by which a file of ms-swift is recognized."""
DEFAULTS: dict[str, Any] = trainer_keys.DEFAULTS | {
    "parallel": "ddp", "train.lr_schedule": "cosine", "train.warmup_ratio": 0.05, "train.warmup_steps": None, "train.beta2": 0.95,
    "train.learning_rate": 1e-4, "train.weight_decay": 0.1, "train.activation_checkpointing": "full",
    "data.validation_fraction": 0.0,
}  # fmt: skip


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for a training on `gpus` GPUs."""
    tuner = choice(
        {"lora": {"/adapter": "lora"}, "full": {"/adapter": "none"}},
        "Muster has adapter=lora, qlora, dora, rslora and none",
    )
    return {
        **trainer_keys.rules(gpus),
        "gradient_checkpointing_kwargs": trainer_keys.reentrant(by_default=True),
        "model": SOURCE,
        "model_type": unneeded("config.json says it"),
        "model_revision": kept("model.revision"),
        "use_hf": unneeded("Muster reads Hugging Face's Hub"),
        "torch_dtype": unneeded("Muster reads any dtype; train.precision is that of compute"),
        "task_type": choice({"causal_lm": {}}, "Muster trains causal language models"),
        "tuner_type": tuner,
        "train_type": tuner,
        "sft_type": tuner,
        "adapters": adapter_source,
        "lora_rank": kept("adapter.r"),
        "init_weights": ADAPTER_INIT,
        "lora_alpha": number("adapter.alpha"),
        "lora_dropout": number("adapter.dropout"),
        "lorap_lr_ratio": kept("adapter.lora_plus_ratio"),
        "use_rslora": flag({"adapter.rslora": True}),
        "use_dora": flag({"adapter.dora": True}),
        "target_modules": targets,
        "target_parameters": targets,
        "modules_to_save": saved_modules,
        "freeze_vit": unneeded("only text is trained"),
        "freeze_parameters": refused("name what is trained in train.unfrozen"),
        "trainable_parameters": kept("train.unfrozen"),
        "quant_method": choice({"bnb": {}}, "Muster has adapter=qlora and qlora8"),
        "quant_bits": choice({"4": {"adapter.base": "nf4"}, "8": {"adapter.base": "int8"}}, "Muster stores a base in 4 or 8 bits"),
        "bnb_4bit_quant_type": choice({"nf4": {}}, "Muster stores 4 bits as nf4"),
        "bnb_4bit_compute_dtype": unneeded("train.precision is that of compute"),
        "bnb_4bit_use_double_quant": choice({"true": {}}, "Muster always quantizes the scales of nf4 too"),
        "dataset": _datasets,
        "val_dataset": _val_dataset,
        "split_dataset_ratio": held_out,
        "dataset_num_proc": kept("data.workers"),
        "dataset_shuffle": flag({}, {"data.order": "file"}),
        "train_dataloader_shuffle": flag({}, {"data.order": "file"}),
        "streaming": STREAMING,
        "strict": unneeded("data.gates says how many bad rows are allowed"),
        "load_from_cache_file": unneeded("token sets are named by their content"),
        "template": template,
        "system": SYSTEM,
        "max_length": kept("data.max_length"),
        "truncation_strategy": choice(
            {"delete": {"data.overlong": "drop"}, "right": {"data.overlong": "truncate"}, "split": {"data.overlong": "split"},
             "raise": {"data.overlong": "error"}},
            "Muster has data.overlong=truncate (on the right), split, drop and error",
        ),
        "packing": kept("data.packing"),
        "padding_free": unneeded("data.packing=true does it; the samples of a row are kept apart"),
        "loss_scale": choice(
            {"default": {}, "all": {"data.mask": "all"}, "last_round": {"data.mask": "last"}},
            "a token is trained or not. Use data.mask=assistant, last or all, or mark turns with `train`",
        ),
        "model_author": unneeded("is for the self-cognition rows of ms-swift"),
        "model_name": unneeded("is for the self-cognition rows of ms-swift"),
        "attn_impl": attention,
        "sequence_parallel_size": kept("parallel.context_ranks"),
        "add_version": unneeded("each run has a folder of its own"),
        "create_checkpoint_symlink": unneeded("RUN/checkpoints/latest names the newest"),
        "rlhf_type": refused("Muster fine-tunes on rows. Use TRL for DPO, GRPO and others"),
        "new_special_tokens": tokens,
    }  # fmt: skip


def _path(name: str) -> tuple[dict[str, Any], str | None]:
    """`owner/name:subset/subset#500` and files: (Muster's keys, why it is refused)."""
    source, _, count = name.partition("#")
    source, _, subset = source.partition(":")
    source = source.removeprefix("HF::").removeprefix("hf::")
    if source.startswith("MS::"):
        return {}, "is a data set of ModelScope. Download it and give its path"
    ours: dict[str, Any] = {"path": source}
    if subset and subset != "default":
        if "/" in subset:
            return {}, f"has several subsets ({subset}). Write a set for each"
        ours["subset"] = subset
    if count:
        ours["num_samples"] = int(count)
    return ours, None


@described("`data.path`, or `data.sets`")
def _datasets(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = value if isinstance(value, list) else str(value).split()
    found = [_path(str(name)) for name in names]
    if refusal := next((why for _, why in found if why), None):
        return Row(key, value, Outcome.refused, why=refusal)
    sets = {f"set{number}": ours for number, (ours, _) in enumerate(found)}
    if len(sets) == 1 and "num_samples" not in sets["set0"]:
        ours = sets["set0"]
        name = str(ours["path"]).rstrip("/").split("/")[-1].split(".")[0]
        return Row(
            key, value, Outcome.kept, {"/data": "jsonl", "data.name": name, **{f"data.{k}": v for k, v in ours.items()}}
        )
    return Row(key, value, Outcome.kept, {"/data": "mix", "data.sets": sets})


@described("`data.validation_path`")
def _val_dataset(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = value if isinstance(value, list) else str(value).split()
    if len(names) != 1 or "#" in names[0]:
        return Row(
            key, value, Outcome.refused, why="Muster has one data.validation_path, with data.validation_split='[:500]'"
        )
    return Row(key, value, Outcome.kept, {"data.validation_path": names[0]})
