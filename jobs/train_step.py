"""One optimizer step of the training loop: forward and backward for each micro batch, the update, and what is reported of it."""

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray

from conf.batch import split
from conf.errors import DivergedError
from jobs.data import batches
from jobs.distributed import heartbeat
from jobs.distributed.process_group import all_reduce_sum
from jobs.model import router_loss, unwrap
from jobs.monitoring.step_monitor import log_fields
from jobs.train_state import Requests, StepTotals, Training
from jobs.training import loss, lr_schedule


def run(training: Training, step: int) -> Requests:
    """One optimizer step over the global batch. Returns what the ranks were asked for. `step` counts from 0."""
    world, monitor = training.world, training.monitor
    began = time.perf_counter()
    stop_requested, save_requested = training.stop.requested(), training.stop.save_requested()
    monitor.begin_step(step, training.last_step)
    # A seed per step lets dropout resume without saved state. Ranks that share matrices need the same dropout.
    torch.manual_seed(hash((training.config.train.seed, step, world.rank // world.tensor_ranks)) % 2**63)

    rows = training.sampler.rows_of(step)
    tokens = int(training.train_rows.label_counts[rows].sum())
    loss_sums = _forward_backward(training, step, rows, tokens)
    learning_rate = lr_schedule.learning_rate(step, training.last_step, training.config)
    with monitor.timer("optimizer"):
        grad_norm = training.backend.step(training.engine, learning_rate)

    # One all-reduce for all that ranks must agree on. Reading the result waits until the GPU has finished the step.
    is_overtaken = world.is_main and training.sweep_rung.review(step + 1)
    asked = [stop_requested, save_requested, training.saver.written, is_overtaken]
    flags = torch.tensor(asked, dtype=torch.float64, device=world.device)
    totals = StepTotals(*all_reduce_sum(torch.cat([loss_sums, flags])).tolist())
    seconds = time.perf_counter() - began
    mean_loss = totals.loss / world.tensor_ranks / tokens
    _check_finite(training, step + 1, mean_loss, grad_norm)
    values = {"loss": mean_loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "tokens": tokens}
    if router_loss.attached(unwrap.causal_lm(training.engine.module)):
        values["router_loss"] = totals.router_loss / world.size
    values |= {"seconds": round(seconds, 4)} | monitor.end_step(rows, seconds)
    _report(training, step + 1, values)
    training.profiler.step()
    if totals.finished_writes == world.size:
        training.saver.publish_pending()
    return Requests(totals.stop_requests > 0, totals.save_requests > 0, totals.overtaken > 0)


def _forward_backward(training: Training, step: int, rows: NDArray[np.int64], tokens: int) -> torch.Tensor:
    """Forward and backward for this rank's micro batches. Returns (summed loss, mean router loss), float64 on the device.

    `rows` is the global batch, int64 of shape (rows,), and `tokens` the number of its trained tokens. The loss to minimize is
    the mean over these tokens, however they are split into ranks and micro batches. So each rank divides its sum by the
    global number of tokens. Backends average gradients over ranks, so it also multiplies by the number of ranks; ranks of
    one tensor-parallel group compute the same sum and count as one. A router loss is a mean over the tokens of a micro batch,
    as in transformers; what is minimized contains the mean of those of all micro batches and ranks.
    """
    world, timer = training.world, training.monitor.timer
    micro_batch_size, _ = split(training.config, world.size)
    micro_batches = list(batches.micro_batches(rows, micro_batch_size, world.data_rank, world.data_size))
    loss_scale, smoothing = world.size // world.tensor_ranks / tokens, training.config.train.label_smoothing
    shortest = training.config.data.max_length if training.config.data.pad_to_max else 1
    loss_sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for number, own_rows in enumerate(micro_batches, 1):
        heartbeat.beat("train", step + 1)
        training.monitor.add_micro_batch(len(own_rows), float(training.sampler.costs[own_rows].max()))
        with timer("data"):
            batch = batches.collate(
                training.train_rows,
                own_rows,
                training.pad_token,
                device=world.device,
                context_part=world.context_part,
                at_least=shortest,
            )
        with timer("forward"):
            lengths = training.train_rows.lengths[own_rows]
            summed, router = loss.training_losses(training.engine.module, batch, lengths, world.context_part, smoothing)
            to_minimize = summed * loss_scale
            if router is not None:
                to_minimize = to_minimize + router / len(micro_batches)
                loss_sums[1] += router.detach().double() / len(micro_batches)
        with timer("backward"):
            is_last = number == len(micro_batches)  # replicas average gradients once per step, on the last micro batch
            training.backend.backward(training.engine, to_minimize, last=is_last)
        loss_sums[0] += summed.detach().double()
    heartbeat.beat("train", step + 1)
    return loss_sums


def _check_finite(training: Training, step: int, mean_loss: float, grad_norm: float) -> None:
    """Raise FloatingPointError for NaN or infinity, on all ranks: they have the same values. The step is not saved."""
    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        return
    training.metrics.write_report("failed")
    training.saver.publish_pending()  # the pending checkpoint is of an earlier step, and good
    values = f"loss {mean_loss}, gradient norm {grad_norm}"
    remedy = "go on from an earlier checkpoint with a lower rate: muster resume RUN train.resume_step=N train.learning_rate=..."
    raise FloatingPointError(f"step {step}: {values}; {remedy}")


def _report(training: Training, step: int, values: dict[str, float]) -> None:
    """Write a finished step to metrics.jsonl, and log it if a line is due. Raises DivergedError on all ranks."""
    metrics = training.metrics
    log_is_due = step == training.last_step or step % training.config.train.log_every == 0
    if log_is_due:
        measured, warnings = training.monitor.gather()
        values |= measured | {"left_s": round(metrics.seconds_left(step)), "steps": training.last_step}
        metrics.warn(step, warnings)
    metrics.write(step, **values)
    if log_is_due:
        metrics.log_step(step, **log_fields(values, on_gpu=training.world.device.type == "cuda"))
    training.sweep_rung.add_loss(values["loss"])
    if flat := training.flat_loss.add_loss(step, values["loss"]):
        metrics.warn(step, [flat])
    try:
        training.divergence.add_loss(step, values["loss"])
    except DivergedError:
        metrics.write_report("failed")
        training.saver.publish_pending()
        raise
