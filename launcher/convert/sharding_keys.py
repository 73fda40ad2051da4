"""Rules for DeepSpeed's JSON and for FSDP's options: they become a layout of the group `parallel`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from conf import resolve
from conf.deepspeed import TUNABLE
from launcher.convert.keys import (
    Outcome,
    Row,
    Rule,
    apply,
    changed,
    choice,
    described,
    joined,
    kept,
    number,
    refused,
    unneeded,
)

OF_MUSTER = unneeded("Muster sets it; it does not change what is trained")
STAGES = {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}


def _auto(rule: Rule) -> Rule:
    """`auto` takes the value of the Trainer's own key."""

    @described(rule.description)
    def auto(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        if value == "auto":
            return Row(key, value, Outcome.unneeded, why="the value of the other key counts")
        return rule(key, value, config)

    return auto


def _device(ours: str) -> Rule:
    return choice(
        {"cpu": {ours: True}, "none": {ours: False}},
        "Muster offloads to host memory only. Use device: cpu, or more GPUs",
    )


@described("`train.beta1`, `train.beta2`")
def _betas(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    return Row(key, value, Outcome.kept, {"train.beta1": value[0], "train.beta2": value[1]})


DEEPSPEED: dict[str, Rule] = {
    "zero_optimization.stage": choice(
        {stage: {"/parallel": name} for stage, name in STAGES.items()}, "ZeRO has the stages 0 to 3"
    ),
    "zero_optimization.offload_optimizer.device": _device("parallel.offload_optimizer"),
    "zero_optimization.offload_param.device": _device("parallel.offload_parameters"),
    **{
        key: _auto(kept(f"parallel.deepspeed.{key}"))
        for key in TUNABLE
        if key.startswith(("zero_optimization.", "fp16.", "communication_"))
    },
    "zero_optimization.zero_hpz_partition_size": refused(
        "Muster has no ZeRO++. Use parallel=hsdp to shard inside nodes"
    ),
    "zero_optimization.zero_quantized_weights": refused("Muster has no ZeRO++. Use train.float8 under parallel=fsdp"),
    "zero_optimization.zero_quantized_gradients": refused("Muster has no ZeRO++. Gradients are reduced exactly"),
    "bf16.enabled": _auto(choice({"true": {"train.precision": "bf16"}, "false": {}}, "is true, false or auto")),
    "fp16.enabled": _auto(choice({"true": {"train.precision": "fp16"}, "false": {}}, "is true, false or auto")),
    "gradient_clipping": _auto(number("train.max_grad_norm")),
    "train_batch_size": _auto(changed("train.global_batch", "rows of a step on all GPUs", make=int)),
    "train_micro_batch_size_per_gpu": _auto(changed("train.micro_batch", "rows of a forward pass of a GPU", make=int)),
    "gradient_accumulation_steps": _auto(unneeded("is part of train.global_batch")),
    "optimizer.type": choice(
        {**dict.fromkeys(("adam", "adamw"), {"train.optimizer": "adamw"}), "muon": {"train.optimizer": "muon"}},
        "Muster has train.optimizer=adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adafactor and muon",
    ),
    "optimizer.params.lr": _auto(number("train.learning_rate")),
    "optimizer.params.eps": _auto(number("train.eps")),
    "optimizer.params.weight_decay": _auto(number("train.weight_decay")),
    "optimizer.params.betas": _auto(_betas),
    "scheduler.type": choice(
        {
            "warmuplr": {"train.lr_schedule": "constant_with_warmup"},
            "warmupdecaylr": {"train.lr_schedule": "linear"},
            "warmupcosinelr": {"train.lr_schedule": "cosine"},
        },
        "Muster has train.lr_schedule=cosine, linear, constant, wsd, inverse_sqrt, polynomial, cosine_restarts",
    ),
    "scheduler.params.warmup_num_steps": _auto(changed("train.warmup_steps", "steps of warmup", make=int)),
    "scheduler.params.warmup_max_lr": _auto(number("train.learning_rate")),
    "scheduler.params.warmup_min_lr": _auto(unneeded("the warmup of Muster begins at 1/warmup_steps of the peak")),
    "scheduler.params.total_num_steps": _auto(changed("train.steps", "steps of the training", make=int)),
    **dict.fromkeys(
        ("zero_optimization.*", "activation_checkpointing.*", "aio.*", "fp16.*", "bf16.*", "flops_profiler.*", "comms_logger.*",
         "zero_allow_*", "zero_force_*", "steps_per_print*", "wall_clock_breakdown*", "dump_state*", "prescale_gradients*",
         "gradient_predivide_factor*", "memory_breakdown*", "data_types.*"),
        OF_MUSTER,
    ),
}  # fmt: skip
"""Dotted key of a DeepSpeed JSON -> its rule. Those at the end only tune memory or speed."""


def deepspeed_rows(settings: Mapping[str, Any]) -> list[Row]:
    """A row for each value of a DeepSpeed JSON."""
    values = {key: value for key, value in resolve.flat(settings).items() if value != {}}
    return [replace(row, key=f"deepspeed.{row.key}") for row in apply(DEEPSPEED, values)]


@described("`parallel=zero1`, `zero2`, `zero3`, `zero3_offload`")
def deepspeed(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """A DeepSpeed JSON that cannot be read here: its name often says the stage."""
    stage = next((stage for stage in "321" if f"zero{stage}" in str(value) or f"z{stage}" in str(value)), None)
    if stage is None:
        return Row(key, value, Outcome.refused, why="no such file here. Give its path relative to this config")
    name = STAGES[stage] + ("_offload" if stage == "3" and ("offload" in str(value) or "cpu" in str(value)) else "")
    why = "no such file here; read from its name"
    return Row(key, value, Outcome.changed, {"/parallel": name}, why)


def of_accelerate(launch: Mapping[str, Any]) -> dict[str, Any]:
    """The sharding of a config of `accelerate launch`, under the keys of a Trainer."""
    zero = launch.get("deepspeed_config")
    if isinstance(zero, Mapping) and zero.get("zero_stage") is not None:
        names = ("offload_optimizer", "offload_param")
        devices = {name: {"device": zero[f"{name}_device"]} for name in names if zero.get(f"{name}_device")}
        return {"deepspeed": {"zero_optimization": {"stage": zero["zero_stage"], **devices}}}
    found = launch.get("fsdp_config")
    return {"fsdp_config": found} if isinstance(found, Mapping) else {}


def fsdp_rows(settings: Mapping[str, Any]) -> list[Row]:
    """A row for each key of an FSDP JSON of ms-swift: `fsdp` and `fsdp_config`."""
    rules = {"fsdp": fsdp, "fsdp_config": fsdp_config, "_*": unneeded("is a remark")}
    return apply(rules, {str(name): value for name, value in settings.items()})


@described("`parallel=fsdp`, `hsdp`, `ddp`, `fsdp_offload`")
def fsdp(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """`fsdp: [full_shard, auto_wrap]`, or text with these words."""
    words = " ".join(value) if isinstance(value, list) else str(value).lower()
    if value in (False, "", [], {}):
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    if "hybrid_shard" in words:
        return Row(key, value, Outcome.kept, {"/parallel": "hsdp"})
    if "no_shard" in words:
        return Row(key, value, Outcome.kept, {"/parallel": "ddp"})
    ours: dict[str, Any] = {"/parallel": "fsdp_offload" if "offload" in words else "fsdp"}
    if "shard_grad_op" in words:
        ours["parallel.reshard_after_forward"] = False
    return Row(key, value, Outcome.kept, ours)


@described("`parallel=fsdp`, `parallel.reshard_after_forward`")
def fsdp_config(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """The section `fsdp_config` of Accelerate's words, with or without the prefix `fsdp_`."""
    if not isinstance(value, Mapping):
        return Row(key, value, Outcome.refused, why="must be a section with keys")
    settings = {str(name).removeprefix("fsdp_").lower(): item for name, item in value.items()}
    parts = [replace(row, key=name) for name, row in zip(value, apply(FSDP, settings), strict=True)]
    row = joined(key, value, parts)
    ours: dict[str, Any] = {}
    if "HYBRID" in str(settings.get("sharding_strategy", "")).upper():
        ours["/parallel"] = "hsdp"
    elif settings.get("offload_params") is True:
        ours["/parallel"] = "fsdp_offload"
    elif not config.get("fsdp") and "/parallel" not in row.ours:  # `fsdp` names the layout
        ours["/parallel"] = "fsdp"
    refused_parts = [part for part in parts if part.outcome is Outcome.refused]
    outcome = Outcome.changed if refused_parts else Outcome.kept
    return replace(row, outcome=outcome, ours=dict(row.ours) | ours, why="Muster shards each decoder block by FSDP2")


@described("`parallel`")
def _strategy(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    """`sharding_strategy` of FSDP1: its name or its number."""
    name = {
        "1": "FULL_SHARD",
        "2": "SHARD_GRAD_OP",
        "3": "NO_SHARD",
        "4": "HYBRID_SHARD",
        "5": "HYBRID_SHARD_ZERO2",
    }.get(str(value), str(value).upper())
    ours: dict[str, dict[str, Any]] = {
        "FULL_SHARD": {},
        "SHARD_GRAD_OP": {"parallel.reshard_after_forward": False},
        "NO_SHARD": {"/parallel": "ddp"},
        "HYBRID_SHARD": {},
        "HYBRID_SHARD_ZERO2": {"parallel.reshard_after_forward": False},
    }
    if name not in ours:
        return Row(key, value, Outcome.refused, why="Muster has parallel=fsdp, hsdp and ddp")
    return Row(key, value, Outcome.kept, ours[name])


_TRUE_OR_FALSE = "is true or false"
FSDP: dict[str, Rule] = {
    "offload_params": choice({"true": {}, "false": {}}, _TRUE_OR_FALSE),
    "cpu_offload": choice({"true": {"/parallel": "fsdp_offload"}, "false": {}}, _TRUE_OR_FALSE),
    "sharding_strategy": _strategy,
    "reshard_after_forward": choice(
        {"true": {}, "false": {"parallel.reshard_after_forward": False}, "full_shard": {}, "hybrid_shard": {},
         "shard_grad_op": {"parallel.reshard_after_forward": False}},
        _TRUE_OR_FALSE,
    ),
    "activation_checkpointing": choice({"true": {"train.activation_checkpointing": "full"}, "false": {}}, _TRUE_OR_FALSE),
    "activation_cpu_offload": choice({"true": {"train.activation_checkpointing": "offload"}, "false": {}}, _TRUE_OR_FALSE),
    "mixed_precision_policy": unneeded("train.precision says it"),
    "mixed_precision": unneeded("train.precision says it"),
    "version": unneeded("Muster uses FSDP2"),
    **dict.fromkeys(
        ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "transformer_cls_names_to_wrap", "min_num_params",
         "backward_prefetch", "backward_prefetch_policy",
         "forward_prefetch", "state_dict_type", "final_state_dict_type", "use_orig_params", "sync_module_states",
         "cpu_ram_efficient_loading", "cpu_offload_pin_memory", "limit_all_gathers", "ignored_modules", "xla", "xla_fsdp_v2",
         "xla_fsdp_grad_ckpt", "process_group_init", "device_mesh"),
        OF_MUSTER,
    ),
}  # fmt: skip
"""A key of FSDP's section, without the prefix `fsdp_` -> its rule."""
