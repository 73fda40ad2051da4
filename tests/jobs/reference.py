"""The reference loss curve that every layout must reproduce: one process, plain torch, no sharding, no accumulation."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from conf.choices import Optimizer
from conf.schema import Config
from jobs.data import batches
from jobs.data.packing import hidden_factor
from jobs.model import block_sizes, build, unwrap


def curve(config: Config, run: Path, steps: int, later: tuple[int, float] | None = None) -> list[tuple[float, float]]:
    """Train on the rows of `run`, with the global batches of `config`. Returns (loss, gradient norm) of each step.

    `later`: a step, and the learning rate that the config has from there on.
    """
    config = deepcopy(config)
    rows = batches.load_split(run / "data", "train", config.data.max_length if config.data.packing else None)
    network = build.build(config).train()
    unwrap.causal_lm(network).set_attn_implementation("sdpa")  # transformers' own mask separates packed samples
    for name, parameter in network.named_parameters() if config.train.unfrozen else ():
        parameter.requires_grad = any(part in name for part in config.train.unfrozen)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = _groups(network, config)
    optimizers = _optimizers([group for group in groups if group["params"]], network, config)
    order = batches.training_order(rows, config, hidden_factor(block_sizes.of(network.config)))
    points = []
    for step in range(steps):
        batch = batches.collate(rows, order.rows_of(step), pad=0)
        logits = network(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            batch.labels[:, 1:].flatten(),
            ignore_index=batches.IGNORED,
            label_smoothing=config.train.label_smoothing,
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        if later and step == later[0]:
            config.train.learning_rate = later[1]
            for group, new in zip(groups, _groups(network, config), strict=True):
                group["share"] = new["share"]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, steps, config) * group["share"]
            optimizer.step()
            optimizer.zero_grad()
        points.append((loss.item(), norm.item()))
    return points


def _groups(network: torch.nn.Module, config: Config) -> list[dict[str, Any]]:
    """One group for each trained weight: its weight decay, and its learning rate as a share of `train.learning_rate`."""
    train, ratio, groups = config.train, config.adapter.lora_plus_ratio or 1, []
    for name, parameter in network.named_parameters():
        rate = next((rate for part, rate in train.learning_rates.items() if part in name), None)
        share = (ratio if "lora_B" in name else 1) if rate is None else rate / train.learning_rate
        decay = train.weight_decay if parameter.ndim >= 2 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "share": share})
    return [group for group in groups if group["params"][0].requires_grad]


def _optimizers(groups: list[dict[str, Any]], network: torch.nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """The optimizers of torch and bitsandbytes that Muster's must equal."""
    train = config.train
    adam: dict[str, Any] = {"betas": (train.beta1, train.beta2), "eps": train.eps}
    match train.optimizer:
        case Optimizer.adafactor:
            return [torch.optim.Adafactor(groups)]
        case Optimizer.muon:
            matrices = [item for name, item in network.named_parameters() if ".layers." in name and item.ndim == 2]
            matrix_ids = {id(item) for item in matrices}
            hidden = [group for group in groups if id(group["params"][0]) in matrix_ids]
            rest = [group for group in groups if id(group["params"][0]) not in matrix_ids]
            return [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, **adam)]
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
