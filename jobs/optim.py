"""The optimizer, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from conf.schema import Config


def build(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; only matrices decay. Fused where the parameters are on a GPU by now, as FSDP's are."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trainable if _ndim(parameter) >= 2],
            "weight_decay": config.train.weight_decay,
        },
        {"params": [parameter for parameter in trainable if _ndim(parameter) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.train.learning_rate,
        betas=(config.train.beta1, config.train.beta2),
        eps=config.train.eps,
        fused=trainable[0].is_cuda,
    )


def _ndim(parameter: nn.Parameter) -> int:
    """Of the whole weight: one that ZeRO-3 has partitioned calls itself an empty vector, and would not decay."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def learning_rate(step: int, steps: int, config: Config) -> float:
    """Of the step that leads from `step` to `step` + 1: linear warmup to the peak, then a cosine to `min_lr_ratio` of it."""
    peak, warmup = config.train.learning_rate, min(config.train.warmup_steps, steps - 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (config.train.min_lr_ratio + (1 - config.train.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)
