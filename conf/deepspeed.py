"""Builds the DeepSpeed config from a Config. No other file sets ZeRO options, so launcher and jobs cannot disagree."""

from collections.abc import Mapping
from typing import Any

from conf.batch import split
from conf.choices import Precision
from conf.resolve import flat
from conf.schema import Config

COUNT, SWITCH, NUMBER, PRECISION, ANY = "a whole number", "true or false", "a number", "fp32, fp16 or bf16", "anything"
ZERO = "zero_optimization."
PERSISTENT = 40_960
"""ZeRO-3 keeps parameters of fewer elements whole on every rank (stage3_param_persistence_threshold)."""
TUNABLE = {
    **dict.fromkeys(
        (f"{ZERO}{name}" for name in (
            "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
            "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "offload_param.buffer_count",
            "offload_param.buffer_size", "offload_param.max_in_cpu", "offload_optimizer.buffer_count",
        )), COUNT),
    **dict.fromkeys(
        (f"{ZERO}{name}" for name in (
            "overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "use_multi_rank_bucket_allreduce",
            "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "memory_efficient_linear",
            "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters", "log_trace_cache_warnings",
            "enable_sanity_checks", "offload_param.pin_memory", "offload_optimizer.pin_memory",
        )), SWITCH),
    **dict.fromkeys(("fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.hysteresis", "fp16.min_loss_scale"), COUNT),
    "fp16.loss_scale": NUMBER,
    "fp16.consecutive_hysteresis": SWITCH,
    "communication_data_type": PRECISION,
    **dict.fromkeys(("steps_per_print",), COUNT),
    **dict.fromkeys(("wall_clock_breakdown", "dump_state", "memory_breakdown"), SWITCH),
    **dict.fromkeys(("flops_profiler.*", "comms_logger.*"), ANY),
}  # fmt: skip
"""Dotted keys of DeepSpeed that `parallel.deepspeed` may set, with what their values must be. Muster's keys decide the others."""


def is_tunable(key: str) -> bool:
    """Whether `parallel.deepspeed` may set a dotted key of DeepSpeed."""
    return key in TUNABLE or f"{key.partition('.')[0]}.*" in TUNABLE


def exported_config(config: Config, world_size: int) -> dict[str, Any]:
    """The config that is written to RUN/deepspeed.json, for Accelerate and Trainer programs in a job.

    Such a program tells DeepSpeed which ranks share their rows, so the batch counts groups of ranks. A program of the user
    (`custom.command`) has a batch and a precision of its own.
    """
    settings = deepspeed_config(config, world_size)
    if config.custom.command is None:
        return settings | {"train_batch_size": settings["train_batch_size"] // config.parallel.context_ranks}
    own = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    settings |= dict.fromkeys(own, "auto")
    for kind in ("bf16", "fp16"):
        settings[kind] |= {"enabled": "auto"}
    if config.parallel.zero_stage == 1:
        del settings["data_types"]  # see deepspeed_config; DeepSpeed then accumulates in the program's precision
    return settings


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The config for `deepspeed.initialize`.

    The values of `parallel.deepspeed` replace those of Muster.

    Gradients are reduced and accumulated in fp32 with every precision, as with FSDP. The exception is ZeRO-1 with bf16, which
    accumulates in bf16: with fp32, DeepSpeed 0.19.8 would use another optimizer, and its own consolidation cannot read the
    checkpoints of that one.
    """
    return _merged(_settings(config, world_size), config.parallel.deepspeed)


def zero_section(config: Config) -> dict[str, Any]:
    """The section `zero_optimization` of `deepspeed_config`, with the keys that have no default in DeepSpeed for this stage."""
    mine = {key: value for key, value in flat(config.parallel.deepspeed).items() if key.startswith(ZERO)}
    section: dict[str, Any] = _merged({"zero_optimization": _zero(config)}, mine)["zero_optimization"]
    return section


def _merged(settings: dict[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the tunable values of `mine`. `auto` is the word of other programs for the value in `settings`."""
    for key, value in flat(mine).items():
        if value in ("auto", None) or not is_tunable(key):
            continue  # launcher.check.deepspeed_rules has compared it with Muster's own key
        *sections, name = key.split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
        # YAML and JSON read 1e9 as a float
        target[name] = int(value) if TUNABLE.get(key) == COUNT else value
    return settings


def _zero(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": parallel.bucket_elements,
        "allgather_bucket_size": parallel.bucket_elements,
    }
    if parallel.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": parallel.bucket_elements,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "stage3_gather_16bit_weights_on_model_save": False,
            "sub_group_size": 10**9,
        }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if parallel.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _settings(config: Config, world_size: int) -> dict[str, Any]:
    parallel, train = config.parallel, config.train
    micro, accumulated = split(config, world_size)
    # `auto` is replaced before training; what stays is for programs that read RUN/deepspeed.json on GPUs
    bf16 = train.precision in (Precision.bf16, Precision.auto)
    fp16 = {"enabled": train.precision is Precision.fp16, "initial_scale_power": 16, "loss_scale_window": 1000}
    return {
        "train_batch_size": micro * accumulated * world_size,  # DeepSpeed does not know ranks that share rows
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": bf16},
        "fp16": fp16,
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and parallel.zero_stage == 1 else "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero(config),
        "zero_force_ds_cpu_optimizer": False,
        # for bitsandbytes; tests/jobs/model/test_adapters.py compares it with training without DeepSpeed
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,  # never: Muster logs the steps itself
    }
