"""Fine-tunes a model: set up, resume from the newest checkpoint, then train step by step with evaluations and checkpoints."""

import time
from functools import partial
from pathlib import Path

import torch

from conf import held_out, mesh, schedule
from conf.batch import micro_batch_limit
from conf.choices import AdapterKind, Verify
from conf.files import write_json
from conf.resolve import digest
from conf.schema import Config
from jobs import backends, train_step
from jobs.checkpoint import checkpointing, disk_space, reshard
from jobs.checkpoint.async_save import Saver
from jobs.data import batches
from jobs.data.packing import hidden_factor
from jobs.distributed import heartbeat, precision, stop_signals
from jobs.distributed.collectives import broadcast_from_rank0
from jobs.distributed.process_group import World, all_reduce_sum, process_group, set_timeout
from jobs.evaluation import reference_logits
from jobs.model import block_sizes, build, embedding_noise, materialize, router_loss, trained_weights, unwrap
from jobs.monitoring import flops
from jobs.monitoring.metrics import Metrics
from jobs.monitoring.profiler import Profiler
from jobs.monitoring.step_monitor import StepMonitor
from jobs.tokenization.tokenizer import load_tokenizer
from jobs.train_state import Training
from jobs.training import loss, sweep_rung
from jobs.training.divergence import DivergenceDetector
from jobs.training.early_stopping import HeldOutLosses
from jobs.training.flat_loss import FlatLossWatch


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
        training.metrics.close("stopped" if stop_reason else "completed")
    if stop_reason:
        stop.raise_stopped(stop_reason, step, training.last_step)


def _set_up(config: Config, world: World, stop: stop_signals.StopFlag) -> tuple[Training, int]:
    """Build the model and all that trains it, and load the newest checkpoint. Also returns the step to continue from."""
    heartbeat.beat("load")
    precision.settle(config, world)

    # Data: the rows of tokens that preprocess has written
    data_folder = Path(config.run_dir) / "data"
    train_rows = batches.load_split(data_folder, "train", config.data.max_length if config.data.packing else None)
    validation_rows = batches.load_split(data_folder, "validation")
    last_step = schedule.steps(config.train, len(train_rows))
    pad_token = load_tokenizer(config).pad_token_id or 0  # a tokenizer without one: no token sees the padding

    # Model: built without weights, so that the backend fills only this rank's shards, from the model's files or a checkpoint
    backend = backends.import_backend(config)
    checkpoint = checkpointing.find_newest(config, world)
    model = build.build_on_meta(config)
    if config.data.packing:
        loss.separate_samples(model, world)
    trained_weights.freeze_others(model, config.train.unfrozen)
    disk_space.check(config, lambda: model, world, last_step)
    router_loss.attach(model)
    embedding_noise.attach(model, config.train.neftune_alpha)
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
    earlier_losses = broadcast_from_rank0(lambda: metrics.earlier_losses)
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
        evaluations=schedule.evaluations(config.train, len(train_rows)),
        saves=schedule.saves(config.train, len(train_rows)),
        held_out=HeldOutLosses(config.train.early_stopping, broadcast_from_rank0(lambda: metrics.held_out_losses)),
        metrics=metrics,
        monitor=monitor,
        divergence=DivergenceDetector(config.train.max_loss_rise, earlier_losses),
        flat_loss=FlatLossWatch(
            schedule.warmup_steps(config.train, last_step), config.train.learning_rate, earlier_losses
        ),
        sweep_rung=sweep_rung.PlannedRung(
            config,
            last_step,
            earlier_losses,
            recorded_step=broadcast_from_rank0(lambda: sweep_rung.recorded_step(Path(config.run_dir))),
        ),
        profiler=Profiler(config, world, first_step=step, last_step=last_step),
        saver=Saver(config, world, metrics),
    )
    return training, step


def _train(training: Training, step: int) -> tuple[int, bool]:
    """Train from `step`, the number of steps already done. Returns (last step done, whether a stop was requested).

    Ends before the last step if a stop was requested, if the held-out loss has stopped falling (`train.early_stopping`), or if
    the loss is among the worst of a sweep (`sweep.stop_worst`).
    """
    last_step, first_step = training.last_step, step
    evaluations, saves = training.evaluations, training.saves
    stopped = not _evaluate_first(training, step)
    set_timeout(training.config.cluster.network.step_timeout_s)

    while step < last_step and not stopped and not training.is_over:
        stopped, save, is_overtaken = train_step.run(training, step)
        step += 1
        # The optimizer state exists now. Pinning host memory for its copy is slow, so it runs during the next steps.
        if step == first_step + 1 and saves.steps and step + saves.steps < last_step:
            training.saver.prepare(training.backend, training.engine)
        # Save before the evaluation: a requested stop may leave little time.
        if step == last_step or stopped or save or saves.is_due(step):
            _save_checkpoint(training, step, wait=step == last_step or stopped)
        if stopped:
            break
        evaluates = step == last_step or evaluations.is_due(step) or training.sweep_rung.is_due(step)
        if evaluates:
            stopped = not _evaluate(training, step)
        if is_overtaken and not stopped and step < last_step:
            _end_among_the_worst(training, step)
        is_over = training.is_over and step < last_step
        is_kept = evaluates and held_out.keeps_best(training.config) and training.held_out.is_best(step)
        if is_over and training.held_out.is_over:
            _log_early_end(training, step)
        if step < last_step and (stopped or is_over or (is_kept and not (save or saves.is_due(step)))):
            # where training ends here, a save that was due is only completed
            _save_checkpoint(training, step, wait=stopped or is_over)
    return step, stopped


def _evaluate_first(training: Training, step: int) -> bool:
    """Evaluate before training, and again if a stop cut it short in an earlier attempt. Returns as `_evaluate` does."""
    rung_is_due = training.sweep_rung.is_due(step) and training.sweep_rung.recorded_step != step
    is_due = step in (0, training.last_step) or training.evaluations.is_due(step) or rung_is_due
    known_loss = broadcast_from_rank0(lambda: training.metrics.held_out_losses.get(step))
    if is_due and known_loss is None:
        return _evaluate(training, step)
    if rung_is_due:
        _compare_with_sweep(training, step, known_loss)
    return True


def _evaluate(training: Training, step: int) -> bool:
    """Compute and report the mean loss over all validation tokens, and compare it with that of the other runs of a sweep.

    False, with nothing reported, if a stop cut it short.
    """
    if not len(training.validation_rows):  # nothing is held out
        _compare_with_sweep(training, step, None)
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
    training.held_out.add(step, loss_sum / tokens)
    training.metrics.write(step, eval_loss=loss_sum / tokens, evaluation_s=round(time.perf_counter() - began, 3))
    training.metrics.log_step(step, **{"held-out loss": f"{loss_sum / tokens:.4f}"})
    _compare_with_sweep(training, step, loss_sum / tokens)
    return True


def _compare_with_sweep(training: Training, step: int, held_out_loss: float | None) -> None:
    """Let all ranks know whether this training ends because it is among the worst of a sweep, where that is decided now."""
    rung = training.sweep_rung
    if rung.is_due(step) and broadcast_from_rank0(lambda: rung.compare(step, held_out_loss)):
        _end_among_the_worst(training, step)


def _end_among_the_worst(training: Training, step: int) -> None:
    """End this run of a sweep after `step`. All ranks call this."""
    training.sweep_rung.is_over = True
    training.metrics.log_lines([broadcast_from_rank0(lambda: training.sweep_rung.record_end(step))])


def _log_early_end(training: Training, step: int) -> None:
    patience, best = training.config.train.early_stopping.patience, training.held_out.best_step()
    why = f"{patience} evaluations did not improve the held-out loss; the best is that of step {best}"
    training.metrics.log_lines([f"training ends at step {step}: {why}"])


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
    is_last = step == training.last_step or training.is_over
    if is_last and config.train.fingerprint:
        # gathering a weight is collective: all ranks go through all of them, rank 0 writes
        fingerprints = {name: checkpointing.fingerprint(value) for name, value in backend.weights(engine)}
        if world.is_main:
            write_json(path / "fingerprint.json", fingerprints)
    if is_last and reference_logits.are_recorded(config):
        rows = training.validation_rows if len(training.validation_rows) else batches.unpacked(training.train_rows)
        required = config.consolidate.verify is Verify.logits
        reference_logits.record(path, engine.module, rows, training.pad_token, world, required=required)
    set_timeout(config.cluster.network.step_timeout_s)
