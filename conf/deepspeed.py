"""Derives the DeepSpeed dictionary from a Config: the one place where ZeRO's settings are written, so they cannot disagree."""

from typing import Any

from conf.batch import split
from conf.choices import Precision
from conf.schema import Config


def plan(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given; also written to RUN/deepspeed.json for Accelerate programs in the job.

    Gradients are reduced and accumulated in fp32 under either precision, as FSDP's are; but ZeRO-1 accumulates in bf16 under
    bf16: with fp32 DeepSpeed would take another optimizer, whose checkpoints its own consolidation cannot read (0.19.8).
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
        "train_batch_size": micro * accumulated * world_size,  # DeepSpeed knows no ranks that share rows
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": bf16},
        "fp16": fp16,
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and parallel.zero_stage == 1 else "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # bitsandbytes'; tests/jobs/model/test_adapters.py holds it against plain training
        "steps_per_print": 2**31 - 1,
    }
