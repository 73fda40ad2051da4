"""The loss of a batch, and the summed loss over the held-out rows. Training and evaluation use the same code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from jobs.data import batches
from jobs.distributed import context_parallel
from jobs.distributed.collectives import broadcast_from_rank0
from jobs.distributed.process_group import World
from jobs.model import fused_cross_entropy, router_loss, unwrap
from jobs.training import packing_probe, sample_borders


def training_losses(
    model: nn.Module,
    batch: batches.Batch,
    lengths: NDArray[np.int64],
    context_part: tuple[int, int] = (0, 1),
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(summed cross entropy, router loss times its coefficient) of a micro batch, scalars in fp32.

    The second is None for a model without one (`jobs.model.router_loss`). It is a mean over the tokens that are not padding:
    `lengths` are the tokens of each row. `context_part` is that of `batches.collate`, `smoothing` is `train.label_smoothing`.
    """
    router = router_loss.attached(unwrap.causal_lm(model))
    if router is None:
        return _losses(model, batch, None, smoothing), None
    columns = batch.input_ids.shape[1]
    positions = np.arange(columns) + context_part[0] * columns
    real_tokens = torch.from_numpy(positions[None] < lengths[:, None]).to(batch.input_ids.device)
    losses = _losses(model, batch, real_tokens, smoothing)
    return losses[0], losses[1] * router.coefficient


def summed_cross_entropy(model: nn.Module, batch: batches.Batch) -> torch.Tensor:
    """Cross entropy summed over the trained tokens of a batch, a scalar in fp32. The caller divides it by a number of tokens.

    `fused_cross_entropy.fuse` makes the model return this loss from its forward, because sharded weights are whole only there.
    Other models return logits, and the loss is computed here.
    """
    return _losses(model, batch, None)


def _losses(
    model: nn.Module, batch: batches.Batch, real_tokens: torch.Tensor | None, smoothing: float = 0.0
) -> torch.Tensor:
    """The summed cross entropy; with `real_tokens` (rows, length), that and the router loss: fp32, shape (2,)."""
    inner = unwrap.causal_lm(model)
    inputs = _model_inputs(inner, batch)
    # The target of a position is the next label, so a row's last position has none and is padded. With context parallelism
    # the labels of a rank have one token more than its inputs, if the row continues on the next rank: nothing to pad then.
    missing = batch.input_ids.shape[1] + 1 - batch.labels.shape[1]
    targets = F.pad(batch.labels[:, 1:], (0, missing), value=batches.IGNORED).flatten()
    if fused_cross_entropy.is_fused(inner):
        inputs |= {"trained": batch.trained, "targets": targets[batch.trained], "smoothing": smoothing}
        fused: torch.Tensor = model(**inputs, **({} if real_tokens is None else {"real_tokens": real_tokens}))
        return fused
    outputs = model(**inputs, **({} if real_tokens is None else {"output_router_logits": True}))
    scores = outputs.logits.float().flatten(0, 1)
    loss = F.cross_entropy(scores, targets, ignore_index=batches.IGNORED, reduction="sum", label_smoothing=smoothing)
    router = router_loss.attached(inner)
    if real_tokens is None or router is None:
        return loss
    return torch.stack([loss, router.mean(outputs.router_logits, real_tokens).float()])


def logits(model: nn.Module, batch: batches.Batch) -> torch.Tensor:
    """Logits (rows, length, vocabulary); with context parallelism, of this rank's tokens only."""
    inputs = _model_inputs(unwrap.causal_lm(model), batch)
    model_logits: torch.Tensor = model(**inputs).logits
    return model_logits


def separate_samples(model: nn.Module, world: World) -> None:
    """Let the functions of this module keep the samples of packed rows apart. All ranks call this together.

    Raises ConfigError on all ranks if the model cannot do that.
    """
    # A context-parallel rank sees a part of each row, from which the other ways cannot be made
    ways = (sample_borders.DEFAULT,) if world.context_ranks > 1 else tuple(sample_borders.WAYS)
    with context_parallel.switched_off():  # only rank 0 tries
        borders = broadcast_from_rank0(lambda: packing_probe.choose_borders(model, world.device, ways))
    unwrap.causal_lm(model).muster_borders = borders


def _model_inputs(inner: Any, batch: batches.Batch) -> dict[str, Any]:
    return sample_borders.model_inputs(batch, inner.config, getattr(inner, "muster_borders", sample_borders.DEFAULT))


def evaluate(
    model: nn.Module,
    rows: batches.Rows,
    micro_batch: int,
    pad: int,
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """Evaluate all rows. Returns this rank's part of (summed loss, tokens), float64 of shape (2,): add over ranks, then divide.

    Returns None if `stop` returns True. It is called before each batch, and must return the same on all ranks.

    Every rank runs the same number of batches, because a sharded model communicates in each. A rank without rows left runs a
    batch that counts nothing.
    """
    model.eval()
    with torch.no_grad():
        sums = _evaluate_batches(model, rows, micro_batch, pad, world, stop)
    model.train()
    return sums


def _evaluate_batches(
    model: nn.Module, rows: batches.Rows, micro_batch: int, pad: int, world: World, stop: Callable[[], bool]
) -> torch.Tensor | None:
    order = np.argsort(rows.lengths, kind="stable")  # rows of similar length in a batch need little padding
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for start in range(0, len(order), micro_batch * world.data_size):
        if stop():
            return None
        first = start + world.data_rank * micro_batch
        local_rows = order[first : first + micro_batch]
        batch = batches.collate(
            rows,
            local_rows if len(local_rows) else order[:1],
            pad,
            device=world.device,
            context_part=world.context_part,
        )
        if not len(local_rows):
            batch.labels.fill_(batches.IGNORED)
            batch.trained = batch.trained[:0]
        sums[0] += summed_cross_entropy(model, batch).double()
        sums[1] += len(batch.trained)
    return sums
