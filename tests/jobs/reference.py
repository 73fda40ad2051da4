"""The reference that every layout is held against: one process, plain torch, no sharding and no accumulation."""

import math
from pathlib import Path

import torch
from torch.nn import functional as F

from conf.schema import Config
from jobs import data, head, model
from jobs.packing import hidden_factor


def curve(config: Config, run: Path, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step on the global batches of `config`, with the rows of `run`."""
    rows = data.read(run / "data", "train", config.data.max_length if config.data.packing else None)
    network = model.build(config).train()
    head.causal(network).set_attn_implementation("sdpa")  # transformers' own mask keeps packed samples apart
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(config.train.beta1, config.train.beta2),
        eps=config.train.eps,
    )
    order = data.ordered(rows, config, hidden_factor(network.config))
    found = []
    for step in range(steps):
        batch = data.batch(rows, order.rows_of(step), pad=0)
        logits = network(**{name: batch[name] for name in ("input_ids", "position_ids") if name in batch}).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=data.IGNORED
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, config)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def _rate(step: int, steps: int, config: Config) -> float:
    """Written out again, so that a wrong schedule shows: linear warmup, then half a cosine down to the floor."""
    peak, floor, warmup = config.train.learning_rate, config.train.min_lr_ratio, config.train.warmup_steps
    if step < warmup:
        return peak / warmup * (step + 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))
