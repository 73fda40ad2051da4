"""Logits of one held-out row: recorded from the live model at its last checkpoint, compared with what the merged one says."""

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
"""In the folder of a checkpoint: `ids` (tokens,), `places` and `logits` (places, vocabulary), fp32."""
LONGEST = 512
"""Tokens of the row, at most, where there is one so short: a merged model is asked on CPUs."""
PLACES = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far the logits of a place may lie from the recorded ones, as a share of their spread (root mean square around their
mean). In fp32 another order of sums makes 1e-6 to 1e-5; in bf16, which has 8 bits, tens of layers add up to 0.01 to 0.02."""


@torch.no_grad()
def record(folder: Path, model: nn.Module, rows: batches.Rows, pad: int, world: World) -> None:
    """Write NAME into the folder of a checkpoint that is whole. All ranks call this; rank 0 writes what it sees, which is the
    beginning of the row where ranks share rows."""
    fits = np.flatnonzero(rows.lengths <= LONGEST)
    row = int(fits[rows.lengths[fits].argmax()] if len(fits) else rows.lengths.argmin())
    tokens = int(rows.lengths[row])
    whole = batches.collate(rows, np.array([row]), pad).input_ids[0, :tokens]
    model.eval()
    found = loss.logits(model, batches.collate(rows, np.array([row]), pad, device=world.device, share=world.share))
    model.train()
    if isinstance(found, DTensor):
        found = found.full_tensor()
    if world.is_main:
        places = torch.linspace(0, min(tokens, found.shape[1]) - 1, PLACES).long().unique()
        kept = {"ids": whole, "places": places, "logits": found[0, places.to(found.device)].float().cpu()}
        beside = folder / f".{NAME}"
        save_file({name: value.contiguous() for name, value in kept.items()}, beside)
        os.replace(beside, folder / NAME)


@torch.no_grad()
def compare(config: Config, checkpoint: Path, folder: Path) -> None:
    """Load the model in `folder`, compute as training did, and compare. What is allowed is by the coarser of the precision that
    was computed in and the one that was written.

    Raises RunError where nothing was recorded, and where a place differs by more than TOLERANCE.
    """
    if not (checkpoint / NAME).exists():
        said = f"needs {NAME}, which training writes with the last checkpoint where this is set: take weights"
        raise RunError(Problem("consolidate.verify", "logits", f"{checkpoint} {said}"))
    kept = load_file(checkpoint / NAME)
    trained = compute_dtype(config)
    written = str((read_json(folder / "config.json") or {}).get("dtype", "float32"))
    whole: Any = load_model.opened(folder, config, trained)
    limit = max(TOLERANCE[trained], TOLERANCE.get(getattr(torch, written), 0.0))
    found = whole(input_ids=kept["ids"][None].to(whole.device), use_cache=False).logits
    off = difference(found[0, kept["places"]].float().cpu(), kept["logits"])
    if not off <= limit:
        said = f"logits differ by {off:.2g} of their spread from those in training, where {limit:g} is rounding"
        raise RunError(Problem("model", folder, f"{said}: it is not what was trained, and is not published"))
    log.info(
        f"verified  logits of {len(kept['places'])} places differ by {off:.2g} of their spread, of {limit:g} allowed"
    )


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest over places of rms(found - wanted) / rms(wanted - mean(wanted)); both (places, vocabulary)."""
    columns = min(found.shape[1], wanted.shape[1])  # sharded heads are padded
    found, wanted = found[:, :columns], wanted[:, :columns]
    spread = (wanted - wanted.mean(1, keepdim=True)).square().mean(1).sqrt()
    return float(((found - wanted).square().mean(1).sqrt() / spread.clamp_min(1e-12)).max())
