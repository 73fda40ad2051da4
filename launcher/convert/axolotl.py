"""Rules for the YAML files of Axolotl."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.convert import (
    axolotl_data,
    axolotl_others,
    axolotl_set_keys,
    hub_keys,
    schedule_keys,
    tracker_keys,
    trainer_keys,
)
from launcher.convert.common_rules import (
    EMBEDDING_RATE,
    FUSED,
    NO_EFFECT,
    SOURCE,
    SYSTEM,
    adapter_init,
    adapter_source,
    attention,
    flag,
    held_out,
    layers,
    saved_modules,
    targets,
)
from launcher.convert.keys import (
    Outcome,
    Row,
    Rule,
    changed,
    choice,
    described,
    joined,
    kept,
    number,
    refused,
    unneeded,
)

MARKERS = {"base_model", "sequence_len", "micro_batch_size", "datasets", "sample_packing", "val_set_size"}
"""Keys by which a file of Axolotl is recognized."""
FIXED: dict[str, Any] = {
    "train.lr_schedule": "cosine",
    "train.min_lr_ratio": 0.0,
    "train.beta2": 0.999,
    "train.epochs": 1.0,
    "data.max_length": 512,
    "data.overlong": "drop",
    "data.validation_fraction": 0.0,
}


def defaults(config: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Defaults of Axolotl that differ from Muster's, under Muster's keys."""
    micro = int(config.get("micro_batch_size") or 1)
    rows = micro * trainer_keys.accumulation(config, micro) * trainer_keys.data_ranks(config, gpus)
    steps = int(config.get("max_steps") or 0)
    warmup = {"train.warmup_steps": min(steps * 3 // 100, 100)} if steps > 0 else {"train.warmup_ratio": 0.03}
    found = FIXED | {"train.micro_batch": micro, "train.global_batch": rows} | warmup
    if config.get("sample_packing") and config.get("pad_to_sequence_len") is None:
        found["data.pad_to_max"] = True
    return found


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for a training on `gpus` GPUs."""
    trainer = trainer_keys.rules(gpus)
    of_muster = unneeded("Muster sets it")
    inherited = (
        "gradient_accumulation_steps", "max_steps", "learning_rate", "warmup_steps", "warmup_ratio", "weight_decay",
        "max_grad_norm", "gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_steps", "eval_steps", "save_steps",
        "eval_strategy", "save_strategy", "save_total_limit", "save_only_model", "save_safetensors", "output_dir",
        "resume_from_checkpoint", "deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "seed", "tf32", "bf16", "fp16",
        "torch_compile", "torch_compile_backend", "torch_compile_mode", "group_by_length",
        "hub_strategy", "hub_revision", "neftune_noise_alpha",
        "adam_beta1", "adam_beta2", "optim_args", "local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
        "dataloader_drop_last", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
        "include_tokens_per_second", "auto_find_batch_size",
        "label_smoothing_factor",
    )  # fmt: skip
    return {
        **axolotl_others.RULES,
        **{name: trainer[name] for name in inherited},
        "hub_model_id": hub_keys.repository(needs_switch=False),
        "base_model": SOURCE,
        "base_model_config": NO_EFFECT,
        "revision_of_model": kept("model.revision"),
        "tokenizer_config": kept("model.tokenizer"),
        "model_type": unneeded("config.json says it"),
        "tokenizer_type": unneeded("the tokenizer's files say it"),
        "tokenizer_use_fast": unneeded("Muster uses fast tokenizers"),
        "tokenizer_legacy": NO_EFFECT,
        "trust_remote_code": kept("model.trust_remote_code"),
        "strict": NO_EFFECT,
        "load_in_8bit": _base("int8", "qlora8"),
        "load_in_4bit": _base("nf4", "qlora"),
        "gptq": refused("GPTQ weights cannot be trained further. Take the model that they were made from, and adapter=qlora"),
        "adapter": _adapter,
        "lora_r": kept("adapter.r"),
        "lora_alpha": number("adapter.alpha"),
        "lora_dropout": number("adapter.dropout"),
        "lora_target_linear": TARGETS,
        "lora_target_modules": TARGETS,
        "lora_target_parameters": TARGETS,
        "lora_fan_in_fan_out": of_muster,
        "lora_modules_to_save": saved_modules,
        "lora_model_dir": adapter_source,
        "lora_on_cpu": NO_EFFECT,
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), of_muster),
        "peft_use_dora": flag({"adapter.dora": True}),
        "peft_use_rslora": flag({"adapter.rslora": True}),
        "peft_layers_to_transform": layers,
        "lora_rank_pattern": kept("adapter.rank_pattern"),
        "lora_alpha_pattern": kept("adapter.alpha_pattern"),
        "peft_init_lora_weights": adapter_init,
        "peft_layers_pattern": refused("name layers in adapter.targets"),
        "loraplus_lr_ratio": kept("adapter.lora_plus_ratio"),
        "loraplus_lr_embedding": EMBEDDING_RATE,
        "unfrozen_parameters": _unfrozen,
        "datasets": axolotl_data.datasets,
        "test_datasets": axolotl_data.test_datasets,
        "pretraining_dataset": _pretraining,
        "dataset_prepared_path": changed("data.cache", "Muster's own files, in the same folder"),
        "dataset_processes": kept("data.workers"),
        "dataset_num_proc": kept("data.workers"),
        "dataset_keep_in_memory": NO_EFFECT,
        "shuffle_merged_datasets": flag({}, {"data.order": "file"}),
        "shuffle_before_merging_datasets": NO_EFFECT,
        "curriculum_sampling": flag({"data.order": "file"}),
        "dataset_exact_deduplication": kept("data.drop_duplicates"),
        "val_set_size": held_out,
        "sequence_len": kept("data.max_length"),
        "eval_sequence_len": unneeded("held-out rows have data.max_length too"),
        "excess_length_strategy": choice(
            {"drop": {"data.overlong": "drop"}, "truncate": {"data.overlong": "truncate"}, "raise": {"data.overlong": "error"}},
            "Muster has data.overlong=truncate, split, drop and error",
        ),
        "sample_packing": choice(
            {"true": {"data.packing": True}, "auto": {"data.packing": True}, "false": {"data.packing": False}}, "is true or false"
        ),
        "eval_sample_packing": unneeded("held-out rows are never packed; their loss is the same"),
        "sample_packing_eff_est": NO_EFFECT,
        "sample_packing_group_size": NO_EFFECT,
        "sample_packing_bin_size": NO_EFFECT,
        "multipack_real_batches": NO_EFFECT,
        "pad_to_sequence_len": kept("data.pad_to_max"),
        "chat_template": _chat_template,
        "chat_template_jinja": kept("data.chat_template"),
        "chat_template_kwargs": kept("data.template_kwargs"),
        "default_system_message": SYSTEM,
        "eot_tokens": kept("data.end_of_turn"),
        "special_tokens": _special_tokens,
        "tokens": _tokens,
        "train_on_inputs": flag({"data.mask": "all"}),
        **tracker_keys.RULES,
        "micro_batch_size": trainer_keys.batch("micro_batch_size", gpus),
        "batch_size": unneeded("rows of a GPU in a step: part of train.global_batch"),
        "eval_batch_size": trainer["per_device_eval_batch_size"],
        "num_epochs": number("train.epochs"),
        "lr_scheduler": choice(schedule_keys.SCHEDULES, schedule_keys.OTHER_SCHEDULE),
        "lr_scheduler_kwargs": schedule_keys.schedule_options,
        "cosine_min_lr_ratio": number("train.min_lr_ratio"),
        "optimizer": schedule_keys.optimizer,
        "adam_epsilon": number("train.eps"),
        "embedding_lr": changed("train.learning_rates", "by name", make=lambda value: {"embed_tokens": float(value)}),
        "evals_per_epoch": trainer_keys.count("train.evals_per_epoch"),
        "saves_per_epoch": trainer_keys.count("train.saves_per_epoch"),
        "early_stopping_patience": kept("train.early_stopping.patience"),
        "noisy_embedding_alpha": number("train.neftune_alpha"),
        "eval_max_new_tokens": kept("generate.max_new_tokens"),
        "loss_watchdog_threshold": unneeded("train.max_loss_rise ends a training that has diverged"),
        "loss_watchdog_patience": unneeded("train.max_loss_rise ends a training that has diverged"),
        "profiler_steps": changed("train.profile", "three early steps", make=bool),
        "evaluation_strategy": trainer["eval_strategy"],
        "activation_checkpointing": trainer["gradient_checkpointing"],
        "auto_resume_from_checkpoints": unneeded("a preempted run always resumes"),
        "bfloat16": trainer["bf16"],
        "float16": trainer["fp16"],
        "flash_attention": flag({"model.attention": "auto"}),
        "sdp_attention": flag({"model.attention": "sdpa"}),
        "eager_attention": flag({"model.attention": "eager"}),
        "flex_attention": flag({"model.attention": "flex"}),
        "xformers_attention": flag({"model.attention": "auto"}),
        "attn_implementation": attention,
        "s2_attention": refused("it changes what attention sees. Use parallel.context_ranks for long rows"),
        **dict.fromkeys(("flash_rotary", "fused_mlp", "flash_attn_rms_norm", "flash_attn_cross_entropy", "flash_attn_fuse_qkv",
                         "flash_attn_fuse_mlp", "cut_cross_entropy", "unsloth_cross_entropy_loss"), of_muster),
        "liger_*": FUSED,
        "sequence_parallel_degree": kept("parallel.context_ranks"),
        "context_parallel_size": kept("parallel.context_ranks"),
        "fsdp_version": unneeded("Muster uses FSDP2"),
        "activation_offloading": choice(
            {**dict.fromkeys(("true", "legacy", "disk"), {"train.activation_checkpointing": "offload"}), "false": {}},
            "is true, legacy or disk",
        ),
        "debug": NO_EFFECT,
        "resize_token_embeddings_to_32x": refused("the embedding gets exactly the rows that the tokenizer needs"),
    }  # fmt: skip


def _base(stored: str, group: str) -> Rule:
    """`load_in_8bit` and `load_in_4bit`: how the base under an adapter is stored."""

    @described(f"`adapter={group}`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        if not value:
            return Row(key, value, Outcome.unneeded, why="asks for nothing")
        if not config.get("adapter"):
            return Row(key, value, Outcome.refused, why=f"quantized weights cannot be trained. Use adapter={group}")
        why = "one scale for each row, without outliers apart" if stored == "int8" else ""
        return Row(key, value, Outcome.changed if why else Outcome.kept, {"adapter.base": stored}, why)

    return rule


@described("`adapter`")
def _adapter(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = {"lora": "lora", "qlora": "qlora"}
    if value not in names:
        return Row(key, value, Outcome.refused, why="Muster has adapter=lora, qlora, qlora8, dora and rslora")
    return Row(key, value, Outcome.kept, {"/adapter": names[value]})


@described("`train.unfrozen`")
def _unfrozen(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """Regular expressions of names, some with a range of rows behind them."""
    patterns = [re.sub(r"\[\d*:\d*\]$", "", str(item)) for item in value]
    if patterns != value:
        return Row(
            key, value, Outcome.changed, {"train.unfrozen": patterns}, "whole weights, not a range of their rows"
        )
    return Row(key, value, Outcome.kept, {"train.unfrozen": patterns})


TARGETS = targets("lora_target_modules", "lora_target_parameters", "lora_target_linear")


@described("`data.chat_template`; null: the tokenizer's own")
def _chat_template(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    outcome, ours, why = axolotl_set_keys.template_of(value)
    return Row(key, value, outcome, ours, why)


@described("`data.path`, with `data.format=text`; all rows are tokenized before training")
def _pretraining(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """Texts of a corpus, which Axolotl streams and packs."""
    items = value if isinstance(value, list) else [{"path": value} if isinstance(value, str) else value]
    typed = [{"path": item} if isinstance(item, str) else {"type": "completion", **item} for item in items]
    row = axolotl_data.datasets(key, [{**item, "type": "completion"} for item in typed], config)
    given = {
        f"{key}.{number}.{name}" for number, item in enumerate(items) if isinstance(item, Mapping) for name in item
    }
    parts = tuple(part for part in row.parts if part.key in given)
    why = "; ".join(
        filter(None, [row.why, "all rows are tokenized before training: name a part of a large corpus in data.split"])
    )
    return replace(
        row, value=value, outcome=Outcome.changed, why=why, parts=parts, ours={**row.ours, "data.packing": True}
    )


@described("`data.special_tokens`")
def _tokens(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """New tokens; older files give special tokens by their role here."""
    if isinstance(value, Mapping):
        return _special_tokens(key, value, config)
    return Row(key, value, Outcome.kept, {"data.special_tokens": value if isinstance(value, list) else [value]})


@described("`data.pad_token`, `data.eos_token`, `data.special_tokens`")
def _special_tokens(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    ours = {
        "pad_token": "data.pad_token",
        "eos_token": "data.eos_token",
        "additional_special_tokens": "data.special_tokens",
    }
    parts = []
    for name, token in dict(value).items():
        if token is None:
            parts.append(Row(name, token, Outcome.unneeded, why="is not set"))
        elif name in ours:
            parts.append(Row(name, token, Outcome.kept, {ours[name]: token}))
        else:
            parts.append(Row(name, token, Outcome.changed, why="the tokenizer's own is used"))
    return joined(key, value, parts)
