"""Fine-tunes a model: set up, resume from the newest checkpoint, then train step by step with evaluations and checkpoints."""

import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from conf import mesh
from conf.batch import micro_batch_limit, split
from conf.choices import AdapterKind, Verify
from conf.errors import DivergedError
from conf.files import write_json
from conf.resolve import digest
from conf.schema import Config
from jobs import backends
from jobs.checkpoint import checkpointing, disk_space, reshard
from jobs.checkpoint.async_save import Saver
from jobs.data import batches
from jobs.data.packing import hidden_factor
from jobs.distributed import heartbeat, stop_signals
from jobs.distributed.collectives import broadcast_from_rank0
from jobs.distributed.process_group import World, all_reduce_sum, process_group, set_timeout
from jobs.evaluation import reference_logits
from jobs.model import block_sizes, build, materialize, router_loss, unwrap
from jobs.monitoring import flops
from jobs.monitoring.metrics import Metrics
from jobs.monitoring.profiler import Profiler
from jobs.monitoring.step_monitor import StepMonitor, log_fields
from jobs.tokenization.tokenizer import load_tokenizer
from jobs.train_state import StepTotals, Training
from jobs.training import loss, lr_schedule
from jobs.training.divergence import DivergenceDetector


def run(config: Config) -> None:
    """Train until the last step and leave a sharded checkpoint.

    Raises Stopped, after saving a checkpoint, if a signal, the stop file or the time limit asks this run to stop.
    """
    with stop_signals.watch(config) as stop, process_group(config) as world:
        training, step = _set_up(config, world, stop)  # step: of the checkpoint that training resumes from, or 0
        step, stopped = _train(training, step)
        heartbeat.beat("finish", step)
        training.profiler.close()
        stop_reason = stop.agree_on_request() if stopped else None
        training.metrics.close()
    if stop_reason:
        stop.raise_stopped(stop_reason, step, training.last_step)


def _set_up(config: Config, world: World, stop: stop_signals.StopFlag) -> tuple[Training, int]:
    """Build the model and all that trains it, and load the newest checkpoint. Also returns the step to continue from."""
    heartbeat.beat("load")

    # Data: the rows of tokens that preprocess has written
    data_folder = Path(config.run_dir) / "data"
    train_rows = batches.load_split(data_folder, "train", config.data.max_length if config.data.packing else None)
    validation_rows = batches.load_split(data_folder, "validation")
    total_rows = (config.train.epochs or 1) * len(train_rows)
    last_step = config.train.steps or max(1, math.ceil(total_rows / config.train.global_batch))
    pad_token = load_tokenizer(config).pad_token_id or 0  # a tokenizer without one: no token sees the padding

    # Model: built without weights, so that the backend fills only this rank's shards, from the model's files or a checkpoint
    backend = backends.import_backend(config)
    checkpoint = checkpointing.find_newest(config, world)
    model = build.build_on_meta(config)
    disk_space.check(config, lambda: model, world, last_step)
    if config.data.packing:
        loss.separate_samples(model, world)
    router_loss.attach(model)
    sampler = batches.training_order(train_rows, config, hidden_factor(block_sizes.of(model.config)))
    # before sharding: FSDP and ZeRO replace the parameters by their shards
    blocks = build.blocks(model)
    model_flops = flops.count_weights(model, frozen=config.adapter.kind is not AdapterKind.none)
    engine = backend.wrap(model, config, world, checkpoint is not None)

    # Checkpoint: one of another layout or number of ranks is resharded while it is read
    load, load_resharded = partial(backend.load, engine), partial(reshard.load, backend, engine)
    step = checkpointing.resume(config, world, load, checkpoint, load_resharded)
    materialize.require_filled(unwrap.causal_lm(engine.module), config, checkpoint is not None)

    # Reporting, and saving
    metrics = Metrics(config, world, last_step=last_step, first_step=step)
    monitor = StepMonitor(config, world, rows=train_rows, flops=model_flops, blocks=blocks)
    metrics.log_lines(mesh.picture(config.parallel, world.size // world.local_size, world.local_size, monitor.nodes))
    divergence = DivergenceDetector(config.train.max_loss_rise, broadcast_from_rank0(lambda: metrics.earlier_losses))
    training = Training(
        config=config,
        world=world,
        stop=stop,
        backend=backend,
        engine=engine,
        train_rows=train_rows,
        validation_rows=validation_rows,
        sampler=sampler,
        pad_token=pad_token,
        last_step=last_step,
        metrics=metrics,
        monitor=monitor,
        divergence=divergence,
        profiler=Profiler(config, world, first_step=step, last_step=last_step),
        saver=Saver(config, world, metrics),
    )
    return training, step


def _train(training: Training, step: int) -> tuple[int, bool]:
    """Train from `step`, the number of steps already done. Returns (last step done, whether a stop was requested)."""
    train, last_step, first_step, stopped = training.config.train, training.last_step, step, False
    # Before training, and again if a stop cut this step's evaluation short in an earlier attempt
    evaluation_is_due = step in (0, last_step) or _is_due(train.eval_every, step)
    if evaluation_is_due and not broadcast_from_rank0(lambda: step in training.metrics.evaluated_steps):
        stopped = not _evaluate(training, step)
    set_timeout(training.config.cluster.network.step_timeout_s)

    while step < last_step and not stopped:
        stopped = _train_step(training, step)
        step += 1
        # The optimizer state exists now. Pinning host memory for its copy is slow, so it runs during the next steps.
        if step == first_step + 1 and train.save_every and step + train.save_every < last_step:
            training.saver.prepare(training.backend, training.engine)
        # Save before the evaluation: a requested stop may leave little time.
        if step == last_step or stopped or _is_due(train.save_every, step):
            _save_checkpoint(training, step, wait=step == last_step or stopped)
        if (step == last_step or _is_due(train.eval_every, step)) and not stopped:
            stopped = not _evaluate(training, step)
            if stopped and step < last_step:
                _save_checkpoint(training, step, wait=True)  # training ends here; a save that was due is only completed
    return step, stopped


def _train_step(training: Training, step: int) -> bool:
    """One optimizer step over the global batch. Returns whether any rank was asked to stop. `step` counts from 0."""
    world, monitor = training.world, training.monitor
    began = time.perf_counter()
    stop_requested = training.stop.requested()
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
    flags = torch.tensor([stop_requested, training.saver.written], dtype=torch.float64, device=world.device)
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
    return totals.stop_requests > 0


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
    loss_scale = world.size // world.tensor_ranks / tokens
    loss_sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for number, own_rows in enumerate(micro_batches, 1):
        heartbeat.beat("train", step + 1)
        training.monitor.add_micro_batch(len(own_rows), float(training.sampler.costs[own_rows].max()))
        with timer("data"):
            batch = batches.collate(
                training.train_rows, own_rows, training.pad_token, device=world.device, context_part=world.context_part
            )
        with timer("forward"):
            lengths = training.train_rows.lengths[own_rows]
            summed, router = loss.training_losses(training.engine.module, batch, lengths, world.context_part)
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
    training.metrics.write_report()
    training.saver.publish_pending()  # the pending checkpoint is of an earlier step, and good
    values = f"loss {mean_loss}, gradient norm {grad_norm}"
    raise FloatingPointError(f"step {step}: {values}; go back to an earlier checkpoint and lower train.learning_rate")


def _report(training: Training, step: int, values: dict[str, float]) -> None:
    """Write a finished step to metrics.jsonl, and log it if a line is due. Raises DivergedError on all ranks."""
    metrics = training.metrics
    log_is_due = step == training.last_step or _is_due(training.config.train.log_every, step)
    if log_is_due:
        measured, warnings = training.monitor.gather()
        values |= measured | {"left_s": round(metrics.seconds_left(step))}
        metrics.warn(step, warnings)
    metrics.write(step, **values)
    if log_is_due:
        metrics.log_step(step, **log_fields(values, on_gpu=training.world.device.type == "cuda"))
    try:
        training.divergence.add_loss(step, values["loss"])
    except DivergedError:
        metrics.write_report()
        training.saver.publish_pending()
        raise


def _evaluate(training: Training, step: int) -> bool:
    """Compute and report the mean loss over all validation tokens. False, with nothing reported, if a stop cut it short."""
    if not len(training.validation_rows):  # nothing is held out
        return True
    world, began = training.world, time.perf_counter()

    def stop_requested() -> bool:
        heartbeat.beat("evaluate", step)
        requested = training.stop.requested()
        return all_reduce_sum(torch.tensor(float(requested), device=world.device)).item() > 0

    model, rows, micro_batch = training.engine.module, training.validation_rows, micro_batch_limit(training.config)
    sums = loss.evaluate(model, rows, micro_batch, training.pad_token, world, stop_requested)
    if sums is None:
        return False
    loss_sum, tokens = all_reduce_sum(sums).tolist()
    training.metrics.write(step, eval_loss=loss_sum / tokens, evaluation_s=round(time.perf_counter() - began, 3))
    training.metrics.log_step(step, **{"held-out loss": f"{loss_sum / tokens:.4f}"})
    return True


def _save_checkpoint(training: Training, step: int, *, wait: bool) -> None:
    """Start to save the checkpoint of `step`. With `wait`, return only when it is complete on disk."""
    config, world, engine, backend = training.config, training.world, training.engine, training.backend
    heartbeat.beat("save", step)
    description = {
        **checkpointing.layout(config, world),
        "config": digest(config),
        "torch": torch.__version__,
        "rows_seen": step * config.train.global_batch,
    }
    set_timeout(config.cluster.network.save_timeout_s)
    path = training.saver.save(backend, engine, step, description, wait=wait)
    if step == training.last_step and config.train.fingerprint:
        # gathering a weight is collective: all ranks go through all of them, rank 0 writes
        fingerprints = {name: checkpointing.fingerprint(value) for name, value in backend.weights(engine)}
        if world.is_main:
            write_json(path / "fingerprint.json", fingerprints)
    if step == training.last_step and config.consolidate.verify is Verify.logits:
        rows = training.validation_rows if len(training.validation_rows) else batches.unpacked(training.train_rows)
        reference_logits.record(path, engine.module, rows, training.pad_token, world)
    set_timeout(config.cluster.network.step_timeout_s)


def _is_due(every: int, step: int) -> bool:
    """Whether `step` is a multiple of `every`. 0 turns it off."""
    return every > 0 and step % every == 0
