"""Records the logits of one held-out row during training, and compares the consolidated model's logits with them."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from conf.choices import AdapterKind, Float8, Verify
from conf.errors import Problem, RunError, first_line
from conf.files import read_json
from conf.schema import Config
from jobs.data import batches
from jobs.distributed import host_memory
from jobs.distributed.process_group import World
from jobs.evaluation import first_blocks, load_model
from jobs.model import unwrap
from jobs.model.build import compute_dtype
from jobs.training import loss

log = logging.getLogger(__name__)

NAME = "logits.safetensors"
"""File in a checkpoint's folder: `ids` (tokens,), `places` (positions,), and in fp32 `logits` (positions, vocabulary) and `hidden`
(positions, width), which are the values after the first blocks."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of config.json that only a mixture of experts has."""
MAX_TOKENS = 128
"""The longest row of at most this many tokens is taken, else the shortest row: the merged model may run on CPUs."""
POSITIONS = 8
MAX_BYTES = 8 * 2**30
"""Of models that are loaded to compare their logits by default. Loading and running larger ones takes longer than the merge."""
MEMORY_SHARE = 0.5
"""Of the memory that this process may still take, for those models."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Largest allowed difference of the logits at a position, as a share of their spread (root mean square around their mean).
In fp32 another order of sums gives 1e-6 to 1e-5. In bf16, which has 8 significant bits, tens of layers add up to 0.01 to 0.02."""


def are_recorded(config: Config) -> bool:
    """Whether training records logits with its last checkpoint.

    Not by default under an adapter, which the merge compares with PEFT's model, nor in float8, which no merged model computes in.
    """
    if config.consolidate.verify is Verify.auto:
        return config.adapter.kind is AdapterKind.none and config.train.float8 is Float8.none
    return config.consolidate.verify is Verify.logits


@torch.no_grad()
def record(
    folder: Path, model: nn.Module, rows: batches.Rows, pad: int, world: World, *, required: bool = True
) -> None:
    """Write NAME into the folder of a complete checkpoint. Without `required`, an error is only logged.

    All ranks must call this. Rank 0 writes its own logits: with context parallelism these are the beginning of the row.
    """
    short = np.flatnonzero(rows.lengths <= MAX_TOKENS)
    row = int(short[rows.lengths[short].argmax()] if len(short) else rows.lengths.argmin())
    tokens = int(rows.lengths[row])
    ids = batches.collate(rows, np.array([row]), pad).input_ids[0, :tokens]
    model.eval()
    batch = batches.collate(rows, np.array([row]), pad, device=world.device, context_part=world.context_part)
    try:
        with first_blocks.outputs(unwrap.causal_lm(model)) as hidden:
            logits = loss.logits(model, batch)
    except Exception as error:  # a training that is complete must not fail for a check that nobody asked for
        if required:
            raise
        log.info(f"logits not recorded: {type(error).__name__}: {first_line(error)}")
        return
    finally:
        model.train()
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if world.is_main:
        places = torch.linspace(0, min(tokens, logits.shape[1]) - 1, POSITIONS).long().unique()
        tensors = {"ids": ids, "places": places, "logits": _at(logits, places)}
        if hidden and hidden[-1].shape[:2] == logits.shape[:2]:
            tensors["hidden"] = _at(hidden[-1], places)
        temporary = folder / f".{NAME}"
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        os.replace(temporary, folder / NAME)


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values of the first row at some positions, in fp32."""
    return values[0, places.to(values.device)].float().cpu()


@torch.no_grad()
def compare(config: Config, checkpoint: Path, folder: Path) -> None:
    """Load the model in `folder`, compute its logits in training's dtype, and compare them with those of `checkpoint`.

    By default a model that is large, or larger than the free memory allows, is compared after its first blocks, and nothing is
    compared if nothing was recorded. The tolerance is that of the coarser dtype of two: the one computed in, and the one the model
    was written in. Raises RunError if values at a position differ by more than the tolerance.
    """
    if not (checkpoint / NAME).exists():
        if config.consolidate.verify is Verify.auto:
            if are_recorded(config):
                log.info(
                    f"logits not compared: {checkpoint.name} has none; training records them with its last checkpoint"
                )
            return
        message = (
            f"{checkpoint} has no {NAME}: training writes it with its last checkpoint, if consolidate.verify=logits was set. "
            "Use consolidate.verify=weights"
        )
        raise RunError(Problem("consolidate.verify", "logits", message))
    recorded = load_file(checkpoint / NAME)
    dtype = compute_dtype(config)
    written_dtype = str((read_json(folder / "config.json") or {}).get("dtype", "float32"))
    tolerance = max(TOLERANCE[dtype], TOLERANCE.get(getattr(torch, written_dtype), 0.0))
    check = partial(
        _check, tolerance=tolerance, folder=folder, routed=dtype is not torch.float32 and _has_experts(folder)
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = host_memory.free_bytes()
    if config.consolidate.verify is Verify.auto and size > min(MAX_BYTES, MEMORY_SHARE * free):
        log.info(f"logits not compared: the model takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
        if "hidden" in recorded:
            actual = first_blocks.hidden_of(folder, recorded["ids"], dtype, config.model.trust_remote_code)
            what = f"values after the first {first_blocks.COUNT} blocks"
            check(None if actual is None else _at(actual, recorded["places"]), recorded["hidden"], what=what)
        return
    model: Any = load_model.load_folder(folder, config, dtype)
    logits = model(input_ids=recorded["ids"][None].to(model.device), use_cache=False).logits
    check(_at(logits, recorded["places"]), recorded["logits"], what="logits")


def _has_experts(folder: Path) -> bool:
    fields = read_json(folder / "config.json") or {}
    return any((fields.get("text_config") or fields).get(name) for name in EXPERTS)


def _check(
    actual: torch.Tensor | None, expected: torch.Tensor, *, tolerance: float, folder: Path, routed: bool, what: str
) -> None:
    """Raise RunError unless the values agree within the tolerance.

    `routed`: rounding may send a token to another expert, so that the median position counts, not the worst.
    """
    if actual is None:
        log.info(f"{what} not compared: this model cannot be built with few blocks")
        return
    of_positions = differences(actual, expected)
    largest = float(of_positions.median() if routed else of_positions.max())
    if not largest <= tolerance:  # written so that NaN is refused too
        message = (
            f"{what} differ by {largest:.2g} of their spread from those in training, but rounding explains only {tolerance:g}: "
            "this is not the model that was trained, so it is not published"
        )
        raise RunError(Problem("model", folder, message))
    log.info(
        f"verified  {what} at {len(expected)} positions differ by {largest:.2g} of their spread ({tolerance:g} allowed)"
    )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Maximum of `differences` over positions."""
    return float(differences(actual, expected).max())


def differences(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """rms(actual - expected) / rms(expected - mean(expected)) of each position. Both are (positions, vocabulary)."""
    columns = min(actual.shape[1], expected.shape[1])  # a sharded output head is padded
    actual, expected = actual[:, :columns], expected[:, :columns]
    spread = (expected - expected.mean(1, keepdim=True)).square().mean(1).sqrt()
    return (actual - expected).square().mean(1).sqrt() / spread.clamp_min(1e-12)
