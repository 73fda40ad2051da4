"""The training objective, and its mean over the held-out rows: the same code in training and in evaluation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jobs.data import batches
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, unwrap


def summed(model: nn.Module, batch: batches.Batch) -> torch.Tensor:
    """Cross entropy summed over the trained tokens of a batch, in fp32: a scalar. Dividing by a token count is the caller's.

    A model with a fused head (`jobs.model.fused_cross_entropy.fuse`) returns it itself, for only inside its forward
    are sharded weights whole.
    """
    inside = unwrap.causal(model)
    inputs = _inputs(batch, inside.config._attn_implementation)
    lacking = batch.input_ids.shape[1] + 1 - batch.labels.shape[1]  # none where the row goes on elsewhere
    following = F.pad(batch.labels[:, 1:], (0, lacking), value=batches.IGNORED).flatten()
    if not fused_cross_entropy.is_fused(inside):
        logits = model(**inputs).logits.float().flatten(0, 1)
        return F.cross_entropy(logits, following, ignore_index=batches.IGNORED, reduction="sum")
    return model(**inputs, trained=batch.trained, targets=following[batch.trained])


def logits(model: nn.Module, batch: batches.Batch) -> torch.Tensor:
    """(rows, length, vocabulary), or of this rank's stretch of the rows."""
    found: torch.Tensor = model(**_inputs(batch, unwrap.causal(model).config._attn_implementation)).logits
    return found


def _inputs(batch: batches.Batch, attention: str) -> dict[str, Any]:
    """What the model's forward takes; the borders of packed samples under transformers' names, for attention that needs them."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.cu_seqlens is not None and ("flash" in attention or "varlen" in attention):
        for side in "qk":
            inputs |= {f"cu_seq_lens_{side}": batch.cu_seqlens, f"max_length_{side}": batch.max_length}
    return inputs


@torch.no_grad()
def held_out(
    model: nn.Module,
    rows: batches.Rows,
    micro_batch: int,
    pad: int,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """This rank's share of (summed loss, tokens) over all rows, float64 of shape (2,): add over ranks, then divide.

    None where `stop`, asked before each batch and of one mind on all ranks, said so.

    Every rank runs the same number of batches, as sharded models need; one that has no row left runs an empty one.
    """
    model.eval()
    order = np.argsort(rows.lengths, kind="stable")
    found = torch.zeros(2, dtype=torch.float64, device=world.device)
    for start in range(0, len(order), micro_batch * world.data_size):
        if stop():
            model.train()
            return None
        first = start + world.data_rank * micro_batch
        mine = order[first : first + micro_batch]
        batch = batches.collate(rows, mine if len(mine) else order[:1], pad, device=world.device, share=world.share)
        if not len(mine):
            batch.labels.fill_(batches.IGNORED)
            batch.trained = batch.trained[:0]
        found[0] += summed(model, batch).double()
        found[1] += len(batch.trained)
    model.train()
    return found
