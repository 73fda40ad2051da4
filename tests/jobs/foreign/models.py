"""Tiny models for checkpoints of other programs, and what every case shares. Nothing of Muster is used to make one."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1024, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
ODD = {
    "hidden_size": 66, "head_dim": 22, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 97,
    "vocab_size": 1023,
}  # fmt: skip
MODELS = {
    "tied": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "untied": ("llama", SMALL),
    "odd": ("llama", {**SMALL, **ODD}),
    "moe": (
        "qwen3_moe",
        {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
TRUTH = "truth.pt"
"""The live weights, gathered and in fp32."""


def start() -> None:
    """Join the ranks. DeepSpeed is to use gloo itself, which needs no compiler."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def start_deepspeed() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def save_base(name: str, folder: Path) -> Path:
    """The model before training, as folder/base."""
    if dist.get_rank() == 0:
        build(name).save_pretrained(folder / "base")
    dist.barrier()
    return folder / "base"


def batch(step: int) -> torch.Tensor:
    """Tokens of this rank."""
    torch.manual_seed(100 + 10 * step + dist.get_rank())
    return torch.randint(3, 1000, (2, 16))


def whole_parameter(parameter: nn.Parameter) -> torch.Tensor:
    """What DeepSpeed trains, or has of a frozen parameter; in fp32. All ranks must call this."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if value is None and hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            value = parameter.detach().clone()
    value = parameter.detach() if value is None else value
    return value.detach().float().clone().view(tuple(getattr(parameter, "ds_shape", parameter.shape)))


def keep_truth(live: dict[str, torch.Tensor], folder: Path) -> None:
    if dist.get_rank() == 0:
        torch.save({name: value.detach().float().clone() for name, value in live.items()}, folder / TRUTH)
