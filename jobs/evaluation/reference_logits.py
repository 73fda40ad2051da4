"""Records the logits of one held-out row during training, and compares the consolidated model's logits with them."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from conf.errors import Problem, RunError
from conf.files import read_json
from conf.schema import Config
from jobs.data import batches
from jobs.distributed.process_group import World
from jobs.evaluation import load_model
from jobs.model.build import compute_dtype
from jobs.training import loss

log = logging.getLogger(__name__)

NAME = "logits.safetensors"
"""File in a checkpoint's folder: `ids` (tokens,), `places` (positions,), and `logits` (positions, vocabulary) in fp32."""
MAX_TOKENS = 512
"""The longest row of at most this many tokens is taken, else the shortest row: the merged model may run on CPUs."""
POSITIONS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest allowed difference of the logits at a position, as a share of their spread (root mean square around their mean).
In fp32 another order of sums gives 1e-6 to 1e-5. In bf16, which has 8 significant bits, tens of layers add up to 0.01 to 0.02."""


@torch.no_grad()
def record(folder: Path, model: nn.Module, rows: batches.Rows, pad: int, world: World) -> None:
    """Write NAME into the folder of a complete checkpoint.

    All ranks must call this. Rank 0 writes its own logits: with context parallelism these are the beginning of the row.
    """
    short = np.flatnonzero(rows.lengths <= MAX_TOKENS)
    row = int(short[rows.lengths[short].argmax()] if len(short) else rows.lengths.argmin())
    tokens = int(rows.lengths[row])
    ids = batches.collate(rows, np.array([row]), pad).input_ids[0, :tokens]
    model.eval()
    logits = loss.logits(
        model, batches.collate(rows, np.array([row]), pad, device=world.device, context_part=world.context_part)
    )
    model.train()
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if world.is_main:
        positions = torch.linspace(0, min(tokens, logits.shape[1]) - 1, POSITIONS).long().unique()
        at_positions = logits[0, positions.to(logits.device)].float().cpu()
        tensors = {"ids": ids, "places": positions, "logits": at_positions}
        partial = folder / f".{NAME}"
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        os.replace(partial, folder / NAME)


@torch.no_grad()
def compare(config: Config, checkpoint: Path, folder: Path) -> None:
    """Load the model in `folder`, compute its logits in training's dtype, and compare them with those of `checkpoint`.

    The tolerance is that of the coarser dtype of two: the one computed in, and the one the model was written in. Raises
    RunError if nothing was recorded, or if the logits at any position differ by more than the tolerance.
    """
    if not (checkpoint / NAME).exists():
        message = (
            f"{checkpoint} has no {NAME}: training writes it with its last checkpoint, if consolidate.verify=logits was set. "
            "Use consolidate.verify=weights"
        )
        raise RunError(Problem("consolidate.verify", "logits", message))
    recorded = load_file(checkpoint / NAME)
    dtype = compute_dtype(config)
    written_dtype = str((read_json(folder / "config.json") or {}).get("dtype", "float32"))
    model: Any = load_model.load_folder(folder, config, dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE.get(getattr(torch, written_dtype), 0.0))
    logits = model(input_ids=recorded["ids"][None].to(model.device), use_cache=False).logits
    largest = difference(logits[0, recorded["places"]].float().cpu(), recorded["logits"])
    if not largest <= tolerance:  # written so that NaN is refused too
        message = (
            f"logits differ by {largest:.2g} of their spread from those in training, but rounding explains only {tolerance:g}: "
            "this is not the model that was trained, so it is not published"
        )
        raise RunError(Problem("model", folder, message))
    log.info(
        f"verified  logits at {len(recorded['places'])} positions differ by {largest:.2g} of their spread ({tolerance:g} allowed)"
    )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Maximum over positions of rms(actual - expected) / rms(expected - mean(expected)). Both are (positions, vocabulary)."""
    columns = min(actual.shape[1], expected.shape[1])  # a sharded output head is padded
    actual, expected = actual[:, :columns], expected[:, :columns]
    spread = (expected - expected.mean(1, keepdim=True)).square().mean(1).sqrt()
    return float(((actual - expected).square().mean(1).sqrt() / spread.clamp_min(1e-12)).max())
