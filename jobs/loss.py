"""The training objective, and its mean over the held-out rows: the same code in training and in evaluation."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from jobs import data


def summed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy summed over the trained tokens of a batch, in fp32: a scalar. Dividing by a token count is the caller's."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return F.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=data.IGNORED, reduction="sum"
    )


@torch.no_grad()
def held_out(
    model: nn.Module,
    rows: data.Rows,
    micro_batch: int,
    pad: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> torch.Tensor:
    """This rank's share of (summed loss, tokens) over all rows, float64 of shape (2,): add over ranks, then divide.

    Every rank runs the same number of batches, as sharded models need; one that has no row left runs an empty one.
    """
    model.eval()
    order = np.argsort(rows.lengths, kind="stable")
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(order), micro_batch * world_size):
        first = start + rank * micro_batch
        mine = order[first : first + micro_batch]
        batch = {
            name: value.to(device) for name, value in data.batch(rows, mine if len(mine) else order[:1], pad).items()
        }
        if not len(mine):
            batch["labels"].fill_(data.IGNORED)
        found[0] += summed(model, batch).double()
        found[1] += (batch["labels"][:, 1:] != data.IGNORED).sum()
    model.train()
    return found
