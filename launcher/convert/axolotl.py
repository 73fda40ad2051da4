"""Rules for the YAML files of Axolotl."""

import re
from collections.abc import Mapping
from typing import Any

from launcher.convert import axolotl_data, hub_keys, trainer_keys
from launcher.convert.common_rules import (
    ADAPTER_INIT,
    EMBEDDING_RATE,
    FUSED,
    NO_EFFECT,
    SOURCE,
    SYSTEM,
    adapter_source,
    attention,
    flag,
    held_out,
    layers,
    saved_modules,
    targets,
)
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, kept, number, refused, unneeded

MARKERS = {"base_model", "sequence_len", "micro_batch_size", "datasets", "sample_packing", "val_set_size"}
"""Keys by which a file of Axolotl is recognized."""
DEFAULTS: dict[str, Any] = {
    "train.lr_schedule": "cosine",
    "train.min_lr_ratio": 0.0,
    "train.warmup_ratio": 0.03,
    "train.beta2": 0.999,
    "parallel": "ddp",
}
"""Defaults of Axolotl that differ from Muster's."""


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
        "lora_target_linear": flag({"adapter.targets": ["all-linear"]}),
        "lora_target_modules": targets,
        "lora_target_parameters": targets,
        "lora_fan_in_fan_out": of_muster,
        "lora_modules_to_save": saved_modules,
        "lora_model_dir": adapter_source,
        "lora_on_cpu": NO_EFFECT,
        **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), of_muster),
        "peft_use_dora": flag({"adapter.dora": True}),
        "peft_use_rslora": flag({"adapter.rslora": True}),
        "peft_layers_to_transform": layers,
        "peft_init_lora_weights": ADAPTER_INIT,
        "peft_layers_pattern": refused("name layers in adapter.targets"),
        "loraplus_lr_ratio": kept("adapter.lora_plus_ratio"),
        "loraplus_lr_embedding": EMBEDDING_RATE,
        "unfrozen_parameters": _unfrozen,
        "datasets": axolotl_data.datasets,
        "test_datasets": axolotl_data.test_datasets,
        "pretraining_dataset": refused("Muster tokenizes all rows before training. Use datasets with type: completion"),
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
        "sample_packing": kept("data.packing"),
        "eval_sample_packing": unneeded("held-out rows are never packed; their loss is the same"),
        "sample_packing_eff_est": NO_EFFECT,
        "sample_packing_group_size": NO_EFFECT,
        "sample_packing_bin_size": NO_EFFECT,
        "multipack_real_batches": NO_EFFECT,
        "pad_to_sequence_len": kept("data.pad_to_max"),
        "chat_template": choice(axolotl_data.TEMPLATES, axolotl_data.TEMPLATE),
        "chat_template_jinja": changed("data.chat_template", "a Jinja file"),
        "default_system_message": SYSTEM,
        "eot_tokens": kept("data.end_of_turn"),
        "special_tokens": _special_tokens,
        "tokens": kept("data.special_tokens"),
        "train_on_inputs": flag({"data.mask": "all"}),
        **trackers(),
        "micro_batch_size": trainer_keys.batch("micro_batch_size", gpus),
        "batch_size": refused("set micro_batch_size and gradient_accumulation_steps"),
        "eval_batch_size": trainer["per_device_eval_batch_size"],
        "num_epochs": number("train.epochs"),
        "lr_scheduler": choice(trainer_keys.SCHEDULES, trainer_keys.OTHER_SCHEDULE),
        "lr_scheduler_kwargs": trainer_keys.schedule_options,
        "cosine_min_lr_ratio": number("train.min_lr_ratio"),
        "optimizer": choice(trainer_keys.OPTIMIZERS, trainer_keys.OTHER_OPTIMIZER),
        "adam_epsilon": number("train.eps"),
        "embedding_lr": changed("train.learning_rates", "by name", make=lambda value: {"embed_tokens": float(value)}),
        "evals_per_epoch": kept("train.evals_per_epoch"),
        "saves_per_epoch": kept("train.saves_per_epoch"),
        "early_stopping_patience": kept("train.early_stopping.patience"),
        "noisy_embedding_alpha": number("train.neftune_alpha"),
        "eval_table_size": refused("use pipeline=evaluate, which writes answers to prompts"),
        "eval_max_new_tokens": kept("generate.max_new_tokens"),
        "loss_watchdog_threshold": unneeded("train.max_loss_rise ends a training that has diverged"),
        "loss_watchdog_patience": unneeded("train.max_loss_rise ends a training that has diverged"),
        "profiler_steps": choice({"0": {}}, "use train.profile=true"),
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
        "plugins": FUSED,
        "liger_*": FUSED,
        "sequence_parallel_degree": kept("parallel.context_ranks"),
        "context_parallel_size": kept("parallel.context_ranks"),
        "tensor_parallel_size": kept("parallel.tensor_ranks"),
        "dp_shard_size": kept("parallel.shard_ranks"),
        "fsdp_version": unneeded("Muster uses FSDP2"),
        "activation_offloading": flag({"train.activation_checkpointing": "offload"}),
        "rl": refused("Muster fine-tunes on rows. Use TRL for DPO, GRPO and others"),
        "reward_model": refused("Muster trains causal language models. Use TRL"),
        "debug": NO_EFFECT,
        "resize_token_embeddings_to_32x": refused("the embedding gets exactly the rows that the tokenizer needs"),
        **dict.fromkeys(("use_ray", "ray_run_name", "ray_num_workers", "resources_per_worker"), refused("Slurm starts the ranks")),
    }  # fmt: skip


def trackers() -> dict[str, Rule]:
    """W&B, MLflow and Comet."""
    return {
        "wandb_project": changed("tracker.project", "with tracker.wandb=true", also={"tracker.wandb": True}),
        "wandb_entity": kept("tracker.entity"),
        "wandb_name": kept("tracker.run_name"),
        "wandb_run_id": unneeded("Muster keeps one id over all attempts of a run"),
        "wandb_mode": choice(
            {"offline": {"cluster.offline": True}, "online": {}}, "is online or offline. To track nothing: tracker=none"
        ),
        "wandb_watch": refused("gradient norms are in the metrics; W&B's watch would read every weight"),
        "wandb_log_model": refused(
            "no tracker stores models here: hub.push=owner/name sends the merged model to the Hub"
        ),
        "use_wandb": flag({"tracker.wandb": True}),
        "use_tensorboard": flag({"tracker.tensorboard": True}),
        "use_mlflow": flag({"tracker.mlflow": True}),
        "mlflow_tracking_uri": changed("tracker.uri", "with tracker.mlflow=true", also={"tracker.mlflow": True}),
        "mlflow_experiment_name": kept("tracker.project"),
        "mlflow_run_name": kept("tracker.run_name"),
        "use_comet": flag({"tracker.comet": True}),
        "comet_project_name": kept("tracker.project"),
        "comet_workspace": kept("tracker.entity"),
        "comet_api_key": refused("secrets are named, not written: cluster.secrets=[COMET_API_KEY]"),
    }


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


@described("`data.pad_token`, `data.eos_token`, `data.special_tokens`")
def _special_tokens(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    ours, lost = {}, []
    for name, token in dict(value).items():
        if token is None:
            continue
        if name in ("pad_token", "eos_token"):
            ours[f"data.{name}"] = token
        elif name == "additional_special_tokens":
            ours["data.special_tokens"] = token
        else:
            lost.append(name)
    if lost:
        return Row(key, value, Outcome.changed, ours, f"{', '.join(lost)}: the tokenizer's own is used")
    return Row(key, value, Outcome.kept, ours)
