"""Rules for the arguments of transformers' Trainer, which LLaMA-Factory, TRL and ms-swift pass on."""

from collections.abc import Mapping
from math import prod
from typing import Any

from launcher.convert import hub_keys, schedule_keys, sharding_keys, tracker_keys, variables
from launcher.convert.common_rules import FUSED, flag
from launcher.convert.keys import (
    Outcome,
    Row,
    Rule,
    changed,
    choice,
    described,
    kept,
    number,
    refused,
    unneeded,
)

DEFAULTS: dict[str, Any] = {
    "train.lr_schedule": "linear",
    "train.min_lr_ratio": 0.0,
    "train.warmup_steps": 0,
    "train.beta2": 0.999,
    "train.learning_rate": 5e-5,
    "train.epochs": 3.0,
}


def defaults(config: Mapping[str, Any], gpus: int, *, micro: int) -> dict[str, Any]:
    """Defaults of a Trainer that differ from Muster's, under Muster's keys. `micro`: rows of a micro batch by default."""
    micro = int(config.get("per_device_train_batch_size") or micro)
    rows = micro * accumulation(config, micro) * data_ranks(config, gpus)
    return DEFAULTS | {"train.micro_batch": micro, "train.global_batch": rows}


SHARED_ROWS = (
    "tensor_parallel_size",
    "context_parallel_size",
    "sequence_parallel_degree",
    "sequence_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
"""Keys with a number of GPUs that compute one row together."""


def data_ranks(config: Mapping[str, Any], gpus: int) -> int:
    """GPUs that have rows of their own, of `gpus`."""
    shared = prod(int(config.get(name) or 1) for name in SHARED_ROWS)
    return max(1, gpus // shared)


def batch(micro: str, gpus: int) -> Rule:
    """Rows of a micro batch: Muster's batch is that of all GPUs together, which does not depend on their number."""

    @described("`train.micro_batch`, `train.global_batch`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        ranks = data_ranks(config, gpus)
        steps = accumulation(config, int(value))
        why = f"global_batch = {micro} x gradient_accumulation_steps x {ranks} GPUs (`--gpus` says another number)"
        ours = {"train.micro_batch": int(value), "train.global_batch": int(value) * steps * ranks}
        return Row(key, value, Outcome.changed, ours, why)

    return rule


def accumulation(config: Mapping[str, Any], micro: int) -> int:
    """Micro batches of a step: the key itself, or the rows of a GPU that Axolotl's `batch_size` gives."""
    found = config.get("gradient_accumulation_steps")
    if isinstance(found, (int, str)) and str(found).isdigit() and int(found) > 0:
        return int(found)
    return max(1, int(config.get("batch_size") or micro) // micro)


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


def precision(name: str, *, off_is_fp32: bool = False) -> Rule:
    """`bf16` and `fp16`: true, auto, full, or false. `off_is_fp32`: a `bf16: false` without `fp16` computes in fp32."""

    @described(f"`train.precision={name}`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        if value in (False, "false", "no"):
            others = [config.get(other) for other in ("fp16", "float16", "bfloat16")]
            if off_is_fp32 and name == "bf16" and not any(item not in (None, False) for item in others):
                return Row(key, value, Outcome.kept, {"train.precision": "fp32"}, "without fp16 it is fp32")
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


@described("`cluster.network.nccl_timeout_s`, up to a day")
def timeout(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if int(value) > DAY:
        return Row(
            key, value, Outcome.unneeded, why="a hang would never be found; rows are tokenized in a job of their own"
        )
    return Row(key, value, Outcome.kept, {"cluster.network.nccl_timeout_s": int(value)})


DAY = 86_400


@described("`train.keep_checkpoints`")
def kept_checkpoints(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if int(value) <= 0:
        return Row(
            key, value, Outcome.unneeded, why="keeps all there; Muster keeps the newest two, or train.keep_every=STEPS"
        )
    return Row(key, value, Outcome.kept, {"train.keep_checkpoints": int(value)})


def count(ours: str) -> Rule:
    """A whole number under Muster's key; 0 asks for nothing."""

    @described(f"`{ours}`")
    def rule(key: str, value: Any, _: Mapping[str, Any]) -> Row:
        if int(value) <= 0:
            return Row(key, value, Outcome.unneeded, why="asks for nothing")
        return Row(key, value, Outcome.kept, {ours: int(value)})

    return rule


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
        "max_steps": schedule_keys.max_steps,
        "lr_scheduler_type": choice(schedule_keys.SCHEDULES, schedule_keys.OTHER_SCHEDULE),
        "lr_scheduler_kwargs": schedule_keys.schedule_options,
        "warmup_ratio": schedule_keys.warmup_ratio,
        "warmup_steps": schedule_keys.warmup_steps,
        "optim": schedule_keys.optimizer,
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
        "bf16": precision("bf16", off_is_fp32=True),
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
        "eval_steps": schedule_keys.interval("train.eval_every", "train.evals_per_epoch"),
        "eval_strategy": schedule_keys.strategy("train.eval_every", "train.evals_per_epoch"),
        "evaluation_strategy": schedule_keys.strategy("train.eval_every", "train.evals_per_epoch"),
        "eval_on_start": unneeded("Muster always evaluates before the first step"),
        "save_steps": schedule_keys.interval("train.save_every", "train.saves_per_epoch"),
        "save_strategy": schedule_keys.strategy("train.save_every", "train.saves_per_epoch"),
        "save_total_limit": kept_checkpoints,
        "save_only_model": unneeded("checkpoints always have the optimizer, so that a run can resume"),
        "save_safetensors": of_muster,
        "save_on_each_node": of_muster,
        "load_best_model_at_end": flag({"consolidate.step": "best"}),
        "metric_for_best_model": unneeded("the held-out loss is the only metric"),
        "greater_is_better": unneeded("the held-out loss is the only metric"),
        "output_dir": changed("run_dir", "the run folder; the merged model lies in run_dir/model"),
        "overwrite_output_dir": unneeded("Muster never overwrites a run: each gets a run_dir of its own"),
        "resume_from_checkpoint": unneeded(
            "`muster resume RUN` goes on with a run, `train.resume_step=N` from a chosen checkpoint; a preempted one does so itself"
        ),
        "run_name": kept("tracker.run_name"),
        "report_to": tracker_keys.report_to,
        "do_train": unneeded("pipeline=train, evaluate or finetune says it"),
        "do_eval": unneeded("the held-out rows are always evaluated"),
        "do_predict": refused("use pipeline=evaluate"),
        "deepspeed": sharding_keys.deepspeed,
        "fsdp": sharding_keys.fsdp,
        "fsdp_config": sharding_keys.fsdp_config,
        "fsdp_transformer_layer_cls_to_wrap": of_muster,
        "ddp_timeout": timeout,
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
        "torch_compile": choice(
            {"true": {"train.compile": True}, "false": {"train.compile": False}, "auto": {}}, "is true, false or auto"
        ),
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
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": reentrant(by_default=False),
        "train_sampling_strategy": choice(
            {"random": {}, "group_by_length": {"data.order": "length"}, "sequential": {"data.order": "file"}},
            "Muster has data.order=random, length, file and balanced",
        ),
        "optim_target_modules": refused(
            "projects gradients, as GaLore does. Use train.optimizer=adamw_8bit or an adapter"
        ),
        "parallelism_config": refused("set parallel.tensor_ranks, context_ranks and shard_ranks"),
        "env": variables.environment,
        "ENV": variables.environment,
        "trackio_*": refused("Muster has tracker=wandb, tensorboard, mlflow and comet"),
        "project": kept("tracker.project"),
        "include_for_metrics": refused("the held-out loss is the only metric"),
        "eval_delay": refused("Muster evaluates from the start, every train.eval_every steps"),
        **dict.fromkeys(
            (
                "fp16_full_eval",
                "use_cache",
                "torch_empty_cache_steps",
                "log_on_each_node",
                "log_level_replica",
                "prediction_loss_only",
                "eval_do_concat_batches",
                "eval_use_gather_object",
                "batch_eval_metrics",
                "enable_jit_checkpoint",
                "dataloader_multiprocessing_context",
                "dataloader_in_order",
                "ddp_static_graph",
                "skip_memory_metrics",
                "jit_mode_eval",
            ),
            no_effect,
        ),
        "restore_callback_states_from_checkpoint": unneeded("a resumed run has its whole state"),
        "accelerator_config": unneeded("Muster splits batches and dispatches rows itself"),
        "label_names": unneeded("Muster makes the labels"),
        "liger_kernel_config": FUSED,
        "ignore_data_skip": unneeded("a resumed run takes exactly the rows that are left"),
    }
