"""Builds the DeepSpeed config from a Config. No other file sets ZeRO options, so launcher and jobs cannot disagree."""

from typing import Any

from conf.batch import split
from conf.choices import Precision
from conf.schema import Config


def exported_config(config: Config, world_size: int) -> dict[str, Any]:
    """The config that is written to RUN/deepspeed.json, for Accelerate and Trainer programs in a job.

    Such a program tells DeepSpeed which ranks share their rows, so the batch counts groups of ranks. A program of the user
    (`custom.command`) has a batch of its own.
    """
    settings = deepspeed_config(config, world_size)
    if config.custom.command is None:
        return settings | {"train_batch_size": settings["train_batch_size"] // config.parallel.context_ranks}
    own = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return settings | dict.fromkeys(own, "auto")


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The config for `deepspeed.initialize`.

    Gradients are reduced and accumulated in fp32 with every precision, as with FSDP. The exception is ZeRO-1 with bf16, which
    accumulates in bf16: with fp32, DeepSpeed 0.19.8 would use another optimizer, and its own consolidation cannot read the
    checkpoints of that one.
    """
    parallel, train = config.parallel, config.train
    micro, accumulated = split(config, world_size)
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
            "stage3_param_persistence_threshold": 40_960,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
            "stage3_gather_16bit_weights_on_model_save": False,
            "sub_group_size": 10**9,
        }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if parallel.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    bf16 = train.precision is Precision.bf16
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
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        # for bitsandbytes; tests/jobs/model/test_adapters.py compares it with training without DeepSpeed
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,  # never: Muster logs the steps itself
    }
