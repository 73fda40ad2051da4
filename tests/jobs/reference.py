"""The reference loss curve that every layout must reproduce: one process, plain torch, no sharding, no accumulation."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from conf.choices import Optimizer
from conf.schema import Config
from jobs.data import batches
from jobs.data.packing import hidden_factor
from jobs.model import block_sizes, build, unwrap


def curve(config: Config, run: Path, steps: int) -> list[tuple[float, float]]:
    """Train on the rows of `run`, with the global batches of `config`. Returns (loss, gradient norm) of each step."""
    rows = batches.load_split(run / "data", "train", config.data.max_length if config.data.packing else None)
    network = build.build(config).train()
    unwrap.causal_lm(network).set_attn_implementation("sdpa")  # transformers' own mask separates packed samples
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizers = _optimizers([group for group in groups if group["params"]], network, config)
    order = batches.training_order(rows, config, hidden_factor(block_sizes.of(network.config)))
    points = []
    for step in range(steps):
        batch = batches.collate(rows, order.rows_of(step), pad=0)
        logits = network(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=batches.IGNORED
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, config)
            optimizer.step()
            optimizer.zero_grad()
        points.append((loss.item(), norm.item()))
    return points


def _optimizers(groups: list[dict[str, Any]], network: torch.nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """The optimizers of torch and bitsandbytes that Muster's must equal."""
    train = config.train
    adam: dict[str, Any] = {"betas": (train.beta1, train.beta2), "eps": train.eps}
    match train.optimizer:
        case Optimizer.adafactor:
            return [torch.optim.Adafactor(groups)]
        case Optimizer.muon:
            matrices = [item for name, item in network.named_parameters() if ".layers." in name and item.ndim == 2]
            muon = torch.optim.Muon(
                [item for item in matrices if item.requires_grad],
                weight_decay=train.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            matrix_ids = {id(item) for item in matrices}
            rest = [group | {"params": [p for p in group["params"] if id(p) not in matrix_ids]} for group in groups]
            return [muon, torch.optim.AdamW(rest, **adam)]
        case Optimizer.adamw_8bit:
            from bitsandbytes.optim import AdamW8bit

            return [AdamW8bit(groups, **adam)]
    return [torch.optim.AdamW(groups, **adam)]


def _rate(step: int, steps: int, config: Config) -> float:
    """The learning rate, written a second time so that a wrong schedule is noticed: linear warmup, then half a cosine."""
    peak, floor, warmup = config.train.learning_rate, config.train.min_lr_ratio, config.train.warmup_steps
    if step < warmup:
        return peak / warmup * (step + 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))
