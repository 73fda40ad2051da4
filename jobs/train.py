"""Training, read from top to bottom: build, shard, resume, then steps until they are done or someone says stop."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from conf import mesh
from conf.batch import rows_at_once, split
from conf.choices import Verify
from conf.errors import DivergedError
from conf.files import write_json
from conf.resolve import digest
from conf.schema import Config
from jobs import backends
from jobs.backends import Backend, Engine
from jobs.checkpoint import checkpointing, reshard
from jobs.checkpoint.async_save import Saver
from jobs.data import batches
from jobs.data.packing import hidden_factor
from jobs.data.sampler import Order
from jobs.distributed import heartbeat, stop_signals
from jobs.distributed.collectives import broadcast_from_rank0
from jobs.distributed.process_group import World, process_group, set_timeout, total
from jobs.evaluation import reference_logits
from jobs.model import build
from jobs.monitoring.metrics import Metrics
from jobs.monitoring.profiler import Trace
from jobs.monitoring.step_monitor import Watch, words, work
from jobs.tokenization.tokenizer import load_tokenizer
from jobs.training import loss, lr_schedule
from jobs.training.divergence import Divergence


@dataclass(frozen=True)
class Loop:
    """What every step needs, and none changes."""

    config: Config
    world: World
    backend: Backend
    engine: Engine
    rows: batches.Rows
    validation: batches.Rows
    order: Order
    pad: int
    """Token id that fills rows up."""
    steps: int
    metrics: Metrics
    watch: Watch
    divergence: Divergence
    trace: Trace
    saver: Saver
    stop: stop_signals.Stop


def run(config: Config) -> None:
    """Train to the last step and leave a sharded checkpoint. Raises Stopped, after saving, when one asked for it."""
    with stop_signals.watched(config) as stop, process_group(config) as world:
        loop, step = _begin(config, world, stop)
        every, steps, stopped = config.train, loop.steps, False
        due = step in (0, steps) or _due(every.eval_every, step)
        # The first evaluation, or one that a stop cut short
        if due and not broadcast_from_rank0(lambda: step in loop.metrics.evaluated):
            stopped = not _evaluate(loop, step)
        set_timeout(config.cluster.network.step_timeout_s)
        begun = step
        while step < steps and not stopped:
            stopped = _step(loop, step)
            step += 1
            if step == begun + 1 and every.save_every and step + every.save_every < steps:
                loop.saver.prepare(loop.backend, loop.engine)
            if step == steps or stopped or _due(every.save_every, step):  # first: time may be short
                _save(loop, step, wait=step == steps or stopped)
            if (step == steps or _due(every.eval_every, step)) and not stopped:
                stopped = not _evaluate(loop, step)
                if stopped and step < steps:
                    _save(loop, step, wait=True)  # done before where it was due
        heartbeat.beat("finish", step)
        loop.trace.close()
        request = stop.agree_on_request() if stopped else None
        loop.metrics.close()
    if request:
        stop.raise_stopped(request, step, steps)


def _begin(config: Config, world: World, stop: stop_signals.Stop) -> tuple[Loop, int]:
    """Everything built and sharded, and the newest checkpoint loaded; with the step that it was saved at."""
    heartbeat.beat("load")
    folder = Path(config.run_dir) / "data"
    rows = batches.read(folder, "train", config.data.max_length if config.data.packing else None)
    validation = batches.read(folder, "validation")
    steps = config.train.steps or max(1, math.ceil((config.train.epochs or 1) * len(rows) / config.train.global_batch))
    pad = load_tokenizer(config).pad_token_id
    backend = backends.import_backend(config)
    found = checkpointing.find(config, world)
    skeleton = build.skeleton(config)
    order = batches.ordered(rows, config, hidden_factor(skeleton.config))
    blocks, costs = build.blocks(skeleton), work(skeleton, config)  # before they are sharded
    engine = backend.wrap(skeleton, config, world, found is not None)
    step = checkpointing.resume(
        config,
        world,
        lambda path: backend.load(engine, path),
        found,
        lambda path, wrote: reshard.load(backend, engine, path, wrote),
    )
    metrics = Metrics(config, world, steps, step)
    watch = Watch(config, world, costs, rows)
    watch.phases.around(blocks)
    metrics.say(mesh.picture(config.parallel, world.size // world.local_size, world.local_size, watch.nodes))
    divergence = Divergence(config.train.max_loss_rise, broadcast_from_rank0(lambda: metrics.losses))
    trace = Trace(config, world, step, steps)
    return (
        Loop(
            config,
            world,
            backend,
            engine,
            rows,
            validation,
            order,
            pad,
            steps,
            metrics,
            watch,
            divergence,
            trace,
            Saver(config, world, metrics),
            stop,
        ),
        step,
    )


def _step(loop: Loop, step: int) -> bool:
    """One optimizer step over the global batch; returns whether any rank was told to stop.

    The loss is the mean over all trained tokens of the global batch, whatever ranks and micro batches they fall into:
    each rank's sum is divided by the global count, times the number of ranks because backends average gradients; over those
    only that do not share matrices, which all have the same sum.
    """
    config, world, rows = loop.config, loop.world, loop.rows
    began, stop, timed = time.perf_counter(), loop.stop.requested(), loop.watch.phases
    loop.watch.begin(step, loop.steps)
    # dropout needs no saved state to be resumed, and is the same on ranks that share matrices
    torch.manual_seed(hash((config.train.seed, step, world.rank // world.tensor_ranks)) % 2**63)
    chosen = loop.order.rows_of(step)
    tokens = int(rows.counts[chosen].sum())
    mine = list(batches.micro_batches(chosen, split(config, world.size)[0], world.data_rank, world.data_size))
    averaged = world.size // world.tensor_ranks
    summed = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, part in enumerate(mine, 1):
        heartbeat.beat("train", step + 1)
        loop.watch.add(len(part), float(loop.order.costs[part].max()))
        with timed("data"):
            batch = batches.batch(rows, part, loop.pad, device=world.device, share=world.share)
        with timed("forward"):
            value = loss.summed(loop.engine.module, batch)
        with timed("backward"):
            loop.backend.backward(loop.engine, value * (averaged / tokens), last=number == len(mine))
        summed += value.detach().double()
    heartbeat.beat("train", step + 1)
    rate = lr_schedule.learning_rate(step, loop.steps, config)
    with timed("optimizer"):
        norm = loop.backend.step(loop.engine, rate)
    flags = torch.tensor([stop, loop.saver.written], dtype=torch.float64, device=world.device)
    agreed = total(torch.cat([summed[None], flags])).tolist()
    seconds = time.perf_counter() - began
    mean = agreed[0] / world.tensor_ranks / tokens
    if not (math.isfinite(mean) and math.isfinite(norm)):  # equal on all ranks, and nothing of it is saved
        loop.metrics.draw()
        loop.saver.publish_pending()
        raise FloatingPointError(
            f"step {step + 1}: loss {mean}, gradient norm {norm}; go back with a smaller learning rate"
        )
    found = {"loss": mean, "grad_norm": norm, "learning_rate": rate, "tokens": tokens, "seconds": round(seconds, 4)}
    _report(loop, step + 1, found | loop.watch.end(chosen, seconds))
    loop.trace.step()
    if agreed[2] == world.size:
        loop.saver.publish_pending()
    return agreed[1] > 0


def _report(loop: Loop, step: int, values: dict[str, float]) -> None:
    """Write down what is known of a step that is done, and say it where a line is due. Raises DivergedError on all ranks."""
    metrics = loop.metrics
    due = step == loop.steps or _due(loop.config.train.log_every, step)
    if due:
        measured, warnings = loop.watch.gathered()
        values |= measured | {"left_s": round(metrics.left(step))}
        metrics.warn(step, warnings)
    metrics.write(step, **values)
    if due:
        loss, norm, rate = values["loss"], values["grad_norm"], values["learning_rate"]
        shown = words(values, on_gpu=loop.world.device.type == "cuda")
        metrics.show(step, loss=f"{loss:.4f}", norm=f"{norm:.3f}", lr=f"{rate:.2e}", **shown)
    try:
        loop.divergence.see(step, values["loss"])
    except DivergedError:
        metrics.draw()
        loop.saver.publish_pending()
        raise


def _evaluate(loop: Loop, step: int) -> bool:
    """Mean loss over all held-out tokens; False, and nothing written, where any rank was told to stop meanwhile."""
    world, began = loop.world, time.perf_counter()

    def told() -> bool:
        heartbeat.beat("evaluate", step)
        return total(torch.tensor(float(loop.stop.requested()), device=world.device)).item() > 0

    micro = rows_at_once(loop.config)
    mine = loss.held_out(loop.engine.module, loop.validation, micro, loop.pad, world, told)
    if mine is None:
        return False
    found = total(mine).tolist()
    loop.metrics.write(step, eval_loss=found[0] / found[1], evaluation_s=round(time.perf_counter() - began, 3))
    loop.metrics.show(step, **{"held-out loss": f"{found[0] / found[1]:.4f}"})
    return True


def _save(loop: Loop, step: int, *, wait: bool) -> None:
    """Begin the checkpoint of `step`; `wait` until it is whole."""
    config, engine, backend = loop.config, loop.engine, loop.backend
    heartbeat.beat("save", step)
    about = {
        **checkpointing.layout(config, loop.world),
        "config": digest(config),
        "torch": torch.__version__,
        "rows_seen": step * config.train.global_batch,
    }
    set_timeout(config.cluster.network.save_timeout_s)
    path = loop.saver.save(backend, engine, step, about, wait=wait)
    if step == loop.steps and config.train.fingerprint:
        prints = {name: checkpointing.fingerprint(value) for name, value in backend.weights(engine)}
        if loop.world.is_main:
            write_json(path / "fingerprint.json", prints)
    if step == loop.steps and config.consolidate.verify is Verify.logits:
        reference_logits.record(path, engine.module, loop.validation, loop.pad, loop.world)
    set_timeout(config.cluster.network.step_timeout_s)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
