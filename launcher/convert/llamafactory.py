"""Rules for the YAML files of LLaMA-Factory."""

from collections.abc import Mapping
from typing import Any

from launcher.convert import trainer_keys
from launcher.convert.common_rules import (
    EMBEDDING_RATE,
    FUSED,
    NO_EFFECT,
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
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, kept, number, refused, unneeded

MARKERS = {"stage", "finetuning_type", "dataset", "template", "cutoff_len", "lora_target", "dataset_dir"}
"""Keys by which a file of LLaMA-Factory is recognized."""
DEFAULTS: dict[str, Any] = trainer_keys.DEFAULTS | {"parallel": "ddp", "data.validation_fraction": 0.0}


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for a training on `gpus` GPUs."""
    return {
        **trainer_keys.rules(gpus),
        "model_name_or_path": SOURCE,
        "adapter_name_or_path": adapter_source,
        "model_revision": kept("model.revision"),
        "trust_remote_code": kept("model.trust_remote_code"),
        "use_fast_tokenizer": unneeded("Muster uses fast tokenizers"),
        "stage": choice({"sft": {}, "pt": {"data.format": "text"}}, "Muster fine-tunes on rows. Use TRL for DPO and others"),
        "finetuning_type": choice(
            {"lora": {"/adapter": "lora"}, "full": {"/adapter": "none"}, "freeze": {"/adapter": "none"}},
            "Muster has adapter=lora, qlora, dora, rslora and none",
        ),
        "freeze_trainable_layers": refused("name the layers in train.unfrozen, for example [layers.30,layers.31]"),
        "freeze_trainable_modules": refused("name the weights in train.unfrozen"),
        "lora_target": targets,
        "lora_rank": kept("adapter.r"),
        "lora_alpha": number("adapter.alpha"),
        "lora_dropout": number("adapter.dropout"),
        "loraplus_lr_ratio": kept("adapter.lora_plus_ratio"),
        "loraplus_lr_embedding": EMBEDDING_RATE,
        "use_rslora": flag({"adapter.rslora": True}),
        "use_dora": flag({"adapter.dora": True}),
        "pissa_init": flag({"adapter.init": "pissa"}),
        "pissa_iter": unneeded("Muster computes the singular values exactly"),
        "pissa_convert": unneeded("consolidate.adapter_only=true writes an adapter that PEFT loads on the same base"),
        "additional_target": saved_modules,
        "create_new_adapter": NO_EFFECT,
        "quantization_bit": choice(
            {"4": {"adapter.base": "nf4"}, "8": {"adapter.base": "int8"}}, "Muster stores a base in 4 or 8 bits"
        ),
        "quantization_method": choice({"bnb": {}, "bitsandbytes": {}, "bnb_4bit": {}}, "Muster has adapter=qlora and qlora8"),
        "quantization_type": choice({"nf4": {}}, "Muster stores 4 bits as nf4"),
        "double_quantization": choice({"true": {}}, "Muster always quantizes the scales of nf4 too"),
        "upcast_layernorm": NO_EFFECT,
        "use_galore": refused("use train.optimizer=adamw_8bit or an adapter"),
        "use_badam": refused("use train.optimizer=adamw_8bit or an adapter"),
        "use_apollo": refused("use train.optimizer=adamw_8bit or an adapter"),
        "use_muon": flag({"train.optimizer": "muon"}),
        "pure_bf16": trainer_keys.precision("bf16"),
        "dataset": _datasets,
        "dataset_dir": unneeded("is the folder of dataset_info.json"),
        "eval_dataset": _eval_dataset,
        "template": template,
        "cutoff_len": kept("data.max_length"),
        "packing": kept("data.packing"),
        "neat_packing": unneeded("Muster always keeps the samples of a packed row apart"),
        "train_on_prompt": flag({"data.mask": "all"}),
        "mask_history": flag({"data.mask": "last"}),
        "max_samples": kept("data.max_rows"),
        "val_size": held_out,
        "overwrite_cache": unneeded("token sets are named by their content"),
        "preprocessing_num_workers": kept("data.workers"),
        "preprocessing_batch_size": NO_EFFECT,
        "tokenized_path": changed("data.cache", "Muster's own files, in the same folder"),
        "streaming": STREAMING,
        "mix_strategy": choice({"concat": {}}, "use data.sets.NAME.weight"),
        "default_system": SYSTEM,
        "enable_thinking": changed("data.template_kwargs", "for the chat template", make=lambda value: {"enable_thinking": value}),
        "flash_attn": attention,
        "rope_scaling": refused("write rope_scaling into config.json of the model"),
        "shift_attn": refused("it changes what attention sees. Use parallel.context_ranks for long rows"),
        "enable_liger_kernel": FUSED,
        "use_unsloth": FUSED,
        "disable_gradient_checkpointing": flag(
            {"train.activation_checkpointing": "none"}, {"train.activation_checkpointing": "full"}
        ),
        "use_reentrant_gc": _reentrant,
        "resize_vocab": unneeded("the embedding gets the rows that the tokenizer needs"),
        "new_special_tokens": tokens,
        "add_tokens": tokens,
        "plot_loss": unneeded("RUN/report.html has the curves"),
        "predict_with_generate": refused("use pipeline=evaluate, which writes answers to prompts"),
        "compute_accuracy": refused("the held-out loss is the only metric"),
        "use_swanlab": refused("Muster has tracker=wandb, tensorboard, mlflow and comet"),
        "ray_run_name": refused("Slurm starts the ranks"),
        "ray_num_workers": refused("Slurm starts the ranks"),
        "infer_backend": NO_EFFECT,
        "hf_hub_token": refused("secrets are named, not written: cluster.secrets=[HF_TOKEN]"),
    }  # fmt: skip


@described("`train.reentrant_checkpointing`")
def _reentrant(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if not value or config.get("disable_gradient_checkpointing"):
        return Row(key, value, Outcome.unneeded, why="the form that is not reentrant is Muster's own")
    ours = {"train.activation_checkpointing": "full", "train.reentrant_checkpointing": True}
    return Row(key, value, Outcome.kept, ours)


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) else [name.strip() for name in str(value).split(",") if name.strip()]


@described("`data.path=dataset_info.json data.subset`, or `data.sets`")
def _datasets(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """Names in dataset_info.json, which Muster reads as it is."""
    info, names = f"{config.get('dataset_dir') or 'data'}/dataset_info.json", _names(value)
    if len(names) == 1:
        ours: dict[str, Any] = {"/data": "jsonl", "data.name": names[0], "data.path": info, "data.subset": names[0]}
    else:
        ours = {"/data": "mix", "data.sets": {name: {"path": info, "subset": name} for name in names}}
    return Row(key, value, Outcome.kept, ours, f"read from {info}")


@described("`data.validation_path`")
def _eval_dataset(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    names = _names(value)
    if len(names) != 1:
        return Row(key, value, Outcome.refused, why="Muster has one data.validation_path. Join the sets into one")
    return Row(
        key,
        value,
        Outcome.kept,
        {"data.validation_path": f"{config.get('dataset_dir') or 'data'}/dataset_info.json:{names[0]}"},
    )
