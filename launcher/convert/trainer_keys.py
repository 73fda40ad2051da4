"""Rules for the arguments of transformers' Trainer, which LLaMA-Factory, TRL and ms-swift pass on."""

from collections.abc import Mapping
from typing import Any

from launcher.convert import hub_keys, sharding_keys
from launcher.convert.common_rules import FUSED, flag
from launcher.convert.keys import Outcome, Row, Rule, changed, choice, described, kept, number, refused, unneeded

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"train.lr_schedule": "linear"},
    "cosine": {"train.lr_schedule": "cosine"},
    "cosine_with_restarts": {"train.lr_schedule": "cosine_restarts", "train.lr_cycles": 1},
    "polynomial": {"train.lr_schedule": "polynomial"},
    "constant": {"train.lr_schedule": "constant"},
    "constant_with_warmup": {"train.lr_schedule": "constant_with_warmup"},
    "inverse_sqrt": {"train.lr_schedule": "inverse_sqrt"},
    "cosine_with_min_lr": {"train.lr_schedule": "cosine"},
    "warmup_stable_decay": {"train.lr_schedule": "wsd"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_hf", "adamw_torch_fused", "fused"), {"train.optimizer": "adamw"}),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), {"train.optimizer": "adamw_8bit"}),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), {"train.optimizer": "paged_adamw"}),
    "paged_adamw_8bit": {"train.optimizer": "paged_adamw_8bit"},
    "adafactor": {"train.optimizer": "adafactor"},
    "muon": {"train.optimizer": "muon"},
}
OTHER_SCHEDULE = (
    "Muster has train.lr_schedule=cosine, linear, constant, wsd, inverse_sqrt, polynomial and cosine_restarts"
)
OTHER_OPTIMIZER = "Muster has train.optimizer=adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adafactor and muon"
DEFAULTS: dict[str, Any] = {
    "train.lr_schedule": "linear",
    "train.min_lr_ratio": 0.0,
    "train.warmup_steps": 0,
    "train.beta2": 0.999,
    "train.learning_rate": 5e-5,
}
"""Defaults of a Trainer that differ from Muster's. They are written where the foreign config does not set them."""


@described("`train.lr_cycles`, `train.lr_power`, `train.min_lr_ratio`")
def schedule_options(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """`lr_scheduler_kwargs`: the options that Muster's schedules have."""
    names = {
        "num_cycles": "train.lr_cycles",
        "power": "train.lr_power",
        "min_lr_rate": "train.min_lr_ratio",
        "min_lr_ratio": "train.min_lr_ratio",
    }
    if not isinstance(value, dict) or (unknown := set(value) - set(names)):
        found = ", ".join(sorted(unknown)) if isinstance(value, dict) else value
        return Row(
            key, value, Outcome.refused, why=f"{found} has no counterpart. Muster has {', '.join(names.values())}"
        )
    return Row(
        key, value, Outcome.kept if value else Outcome.unneeded, {names[name]: item for name, item in value.items()}
    )


def interval(every: str, per_epoch: str) -> Rule:
    """Steps between evaluations or saves: whole steps, or a share of the training."""

    @described(f"`{every}`, or `{per_epoch}`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        strategy = key.replace("_steps", "_strategy")
        if config.get(strategy, config.get("evaluation_strategy") if key == "eval_steps" else None) == "epoch":
            return Row(key, value, Outcome.unneeded, why=f"{strategy} is epoch")
        if float(value) >= 1 or float(value) == 0:
            return Row(key, value, Outcome.kept, {every: int(value)})
        epochs = float(config.get("num_train_epochs") or config.get("num_epochs") or 1)
        times = max(1, round(1 / (float(value) * epochs)))
        return Row(key, value, Outcome.changed, {per_epoch: times}, "a share of the training, as times in an epoch")

    return rule


def strategy(every: str, per_epoch: str) -> Rule:
    """`eval_strategy` and `save_strategy`."""
    options = {"no": {every: 0}, "false": {every: 0}, "epoch": {per_epoch: 1}, "steps": {}}
    return choice(options, "Muster evaluates and saves in steps, or evenly in each epoch")


def batch(micro: str, gpus: int) -> Rule:
    """Rows of a micro batch: Muster's batch is that of all GPUs together, which does not depend on their number."""
    why = f"global_batch = {micro} x gradient_accumulation_steps x {gpus} GPUs (`--gpus` says another number)"

    @described("`train.micro_batch`, `train.global_batch`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        rows = int(value) * int(config.get("gradient_accumulation_steps") or 1) * gpus
        return Row(key, value, Outcome.changed, {"train.micro_batch": int(value), "train.global_batch": rows}, why)

    return rule


@described("`train.warmup_ratio`")
def warmup_ratio(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if config.get("warmup_steps"):
        return Row(key, value, Outcome.unneeded, why="warmup_steps counts, as in a Trainer")
    return Row(key, value, Outcome.kept, {"train.warmup_ratio": value})


@described("`train.warmup_steps`")
def warmup_steps(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if not value and config.get("warmup_ratio"):
        return Row(key, value, Outcome.unneeded, why="warmup_ratio counts, as in a Trainer")
    if 0 < float(value) < 1:
        return Row(key, value, Outcome.kept, {"train.warmup_ratio": value})
    return Row(key, value, Outcome.kept, {"train.warmup_steps": int(value)})


@described("`tracker`")
def report_to(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    if set(names) <= {"none", "all"}:
        return Row(key, value, Outcome.unneeded, why="choose with tracker=wandb, tensorboard, mlflow or comet")
    ours = {"comet_ml": "comet"}
    chosen = [ours.get(name, name) for name in names]
    if unknown := sorted(set(chosen) - {"wandb", "tensorboard", "mlflow", "comet"}):
        return Row(
            key,
            value,
            Outcome.refused,
            why=f"Muster has no tracker {unknown[0]}. Use wandb, tensorboard, mlflow or comet",
        )
    return Row(key, value, Outcome.kept, {f"tracker.{name}": True for name in chosen})


@described("`train.activation_checkpointing`")
def checkpointing(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if value in ("offload", "offload_disk"):
        return Row(key, value, Outcome.kept, {"train.activation_checkpointing": "offload"})
    return Row(key, value, Outcome.kept, {"train.activation_checkpointing": "full" if value else "none"})


def reentrant(by_default: bool) -> Rule:
    """`gradient_checkpointing_kwargs`: the form of recomputation. `by_default`: whether the program recomputes unasked."""

    @described("`train.reentrant_checkpointing`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        options = dict(value) if isinstance(value, dict) else {}
        is_reentrant = options.pop("use_reentrant", False)
        if options:
            why = f"{', '.join(options)} has no counterpart. Muster saves random states where a block has dropout"
            return Row(key, value, Outcome.refused, why=why)
        recomputes = config.get("gradient_checkpointing", by_default) not in (None, False, "offload", "offload_disk")
        if not (is_reentrant and recomputes):
            return Row(key, value, Outcome.unneeded, why="the form that is not reentrant is Muster's own")
        return Row(key, value, Outcome.kept, {"train.reentrant_checkpointing": True})

    return rule


@described("`train.steps`")
def max_steps(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if int(value) <= 0:
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    return Row(key, value, Outcome.kept, {"train.steps": int(value)})


def precision(name: str) -> Rule:
    """`bf16` and `fp16`: true, auto, full, or false."""

    @described(f"`train.precision={name}`")
    def rule(key: str, value: Any, _: Mapping[str, Any]) -> Row:
        if value in (False, "false", "no"):
            return Row(key, value, Outcome.unneeded, why="asks for nothing")
        if value == "full":
            why = "Muster keeps fp32 master weights; pure bf16 loses small updates"
            return Row(key, value, Outcome.changed, {"train.precision": name}, why)
        return Row(key, value, Outcome.kept, {"train.precision": "auto" if value == "auto" else name})

    return rule


@described("`train.log_every`")
def log_every(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if float(value) < 1:
        return Row(key, value, Outcome.changed, {"train.log_every": 1}, "metrics.jsonl has every step")
    return Row(key, value, Outcome.kept, {"train.log_every": int(value)})


def rules(gpus: int) -> dict[str, Rule]:
    """Rules for the arguments of a Trainer that runs on `gpus` GPUs."""
    of_muster = unneeded("Muster sets it")
    no_effect = unneeded("has no effect on what is trained")
    return {
        "per_device_train_batch_size": batch("per_device_train_batch_size", gpus),
        "gradient_accumulation_steps": unneeded("is part of train.global_batch"),
        "per_device_eval_batch_size": unneeded("evaluation uses train.micro_batch; its loss does not depend on it"),
        "eval_accumulation_steps": no_effect,
        "learning_rate": number("train.learning_rate"),
        "num_train_epochs": number("train.epochs"),
        "max_steps": max_steps,
        "lr_scheduler_type": choice(SCHEDULES, OTHER_SCHEDULE),
        "lr_scheduler_kwargs": schedule_options,
        "warmup_ratio": warmup_ratio,
        "warmup_steps": warmup_steps,
        "optim": choice(OPTIMIZERS, OTHER_OPTIMIZER),
        "optim_args": refused("Muster's optimizers have train.beta1, beta2, eps and weight_decay"),
        "weight_decay": number("train.weight_decay"),
        "adam_beta1": number("train.beta1"),
        "adam_beta2": number("train.beta2"),
        "adam_epsilon": number("train.eps"),
        "max_grad_norm": number("train.max_grad_norm"),
        "label_smoothing_factor": number("train.label_smoothing"),
        "neftune_noise_alpha": number("train.neftune_alpha"),
        "seed": kept("train.seed"),
        "data_seed": kept("data.seed"),
        "full_determinism": refused("Muster resumes bit for bit, but does not choose slower kernels"),
        "bf16": precision("bf16"),
        "fp16": precision("fp16"),
        "tf32": choice({"true": {"train.tf32": True}, "false": {}, "auto": {}}, "is true, false or auto"),
        "bf16_full_eval": no_effect,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": reentrant(by_default=False),
        "group_by_length": changed(
            "data.order", "one key for the order of rows", make=lambda value: "length" if value else "random"
        ),
        "length_column_name": no_effect,
        "logging_steps": log_every,
        "logging_strategy": unneeded("metrics.jsonl has every step"),
        "logging_first_step": unneeded("metrics.jsonl has every step"),
        "logging_dir": of_muster,
        "logging_nan_inf_filter": unneeded("NaN ends a training"),
        "eval_steps": interval("train.eval_every", "train.evals_per_epoch"),
        "eval_strategy": strategy("train.eval_every", "train.evals_per_epoch"),
        "evaluation_strategy": strategy("train.eval_every", "train.evals_per_epoch"),
        "eval_on_start": unneeded("Muster always evaluates before the first step"),
        "save_steps": interval("train.save_every", "train.saves_per_epoch"),
        "save_strategy": strategy("train.save_every", "train.saves_per_epoch"),
        "save_total_limit": kept("train.keep_checkpoints"),
        "save_only_model": unneeded("checkpoints always have the optimizer, so that a run can resume"),
        "save_safetensors": of_muster,
        "save_on_each_node": of_muster,
        "load_best_model_at_end": flag({"consolidate.step": "best"}),
        "metric_for_best_model": unneeded("the held-out loss is the only metric"),
        "greater_is_better": unneeded("the held-out loss is the only metric"),
        "output_dir": changed("run_dir", "the run folder; the merged model lies in run_dir/model"),
        "overwrite_output_dir": refused("Muster never overwrites a run: take another run_dir"),
        "resume_from_checkpoint": unneeded(
            "`muster resume RUN` goes on with a run, `train.resume_step=N` from a chosen checkpoint; a preempted one does so itself"
        ),
        "run_name": kept("tracker.run_name"),
        "report_to": report_to,
        "do_train": unneeded("pipeline=train, evaluate or finetune says it"),
        "do_eval": unneeded("the held-out rows are always evaluated"),
        "do_predict": refused("use pipeline=evaluate"),
        "deepspeed": sharding_keys.deepspeed,
        "fsdp": sharding_keys.fsdp,
        "fsdp_config": sharding_keys.fsdp_config,
        "fsdp_transformer_layer_cls_to_wrap": of_muster,
        "ddp_timeout": kept("cluster.network.nccl_timeout_s"),
        "ddp_find_unused_parameters": of_muster,
        "ddp_bucket_cap_mb": of_muster,
        "ddp_broadcast_buffers": of_muster,
        "ddp_backend": of_muster,
        "local_rank": of_muster,
        "dataloader_num_workers": unneeded("rows are tokenized before training"),
        "dataloader_pin_memory": of_muster,
        "dataloader_persistent_workers": no_effect,
        "dataloader_prefetch_factor": no_effect,
        "dataloader_drop_last": unneeded("epochs follow each other without a gap, and no row is dropped"),
        "remove_unused_columns": unneeded("columns that nothing reads are named in the log"),
        "torch_compile": kept("train.compile"),
        "torch_compile_backend": of_muster,
        "torch_compile_mode": of_muster,
        "use_liger_kernel": FUSED,
        "auto_find_batch_size": unneeded(
            "leave train.micro_batch away: Muster takes the largest that is estimated to fit"
        ),
        "include_num_input_tokens_seen": unneeded("metrics.jsonl has the tokens of each step"),
        "include_tokens_per_second": unneeded("metrics.jsonl has them"),
        "average_tokens_across_devices": unneeded("the loss is always the mean over all tokens of the batch"),
        "disable_tqdm": no_effect,
        "log_level": no_effect,
        **hub_keys.RULES,
        "use_cpu": no_effect,
        "ignore_data_skip": unneeded("a resumed run takes exactly the rows that are left"),
    }
