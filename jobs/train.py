"""Training, read from top to bottom: build, shard, resume, then steps until they are done or someone says stop."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from conf.batch import split
from conf.files import write_json
from conf.resolve import digest
from conf.schema import Config
from jobs import backends, checkpoint, data, loss, model, optim, signals
from jobs.agreement import first
from jobs.backends import Engine
from jobs.distributed import World, process_group, set_timeout, total
from jobs.metrics import Metrics
from jobs.order import Order
from jobs.packing import hidden_factor


@dataclass(frozen=True)
class Loop:
    """What every step needs, and none changes."""

    config: Config
    world: World
    backend: ModuleType
    engine: Engine
    rows: data.Rows
    validation: data.Rows
    order: Order
    pad: int
    """Token id that fills rows up."""
    steps: int
    metrics: Metrics
    stop: signals.Stop


def run(config: Config) -> None:
    """Train to the last step and leave a sharded checkpoint. Raises Stopped, after saving, when one asked for it."""
    with signals.watched(config) as stop, process_group(config) as world:
        loop, step = _begin(config, world, stop)
        every, steps, stopped = config.train, loop.steps, False
        due = step in (0, steps) or _due(every.eval_every, step)
        if due and not first(lambda: step in loop.metrics.evaluated):  # the first one, or one that a stop cut short
            stopped = not _evaluate(loop, step)
        set_timeout(config.cluster.network.step_timeout_s)
        while step < steps and not stopped:
            stopped = _step(loop, step)
            step += 1
            if step == steps or stopped or _due(every.save_every, step):  # first: time may be short
                _save(loop, step)
            if (step == steps or _due(every.eval_every, step)) and not stopped:
                stopped = not _evaluate(loop, step)
                if stopped and step < steps:
                    _save(loop, step)  # done before where it was due
        told = stop.agreed() if stopped else None
        loop.metrics.close()
    if told:
        stop.raise_stopped(told, step, steps)


def _begin(config: Config, world: World, stop: signals.Stop) -> tuple[Loop, int]:
    """Everything built and sharded, and the newest checkpoint loaded; with the step that it was saved at."""
    folder = Path(config.run_dir) / "data"
    rows = data.read(folder, "train", config.data.max_length if config.data.packing else None)
    validation = data.read(folder, "validation")
    steps = config.train.steps or max(1, math.ceil((config.train.epochs or 1) * len(rows) / config.train.global_batch))
    pad = model.tokenizer(config).pad_token_id
    backend = backends.chosen(config)
    found = checkpoint.find(config, world)
    skeleton = model.skeleton(config)
    order = data.ordered(rows, config, hidden_factor(skeleton.config))
    engine = backend.wrap(skeleton, config, world, found is not None)
    step = checkpoint.resume(config, world, lambda path: backend.load(engine, path), found)
    metrics = Metrics(config, world, steps, step)
    return Loop(config, world, backend, engine, rows, validation, order, pad, steps, metrics, stop), step


def _step(loop: Loop, step: int) -> bool:
    """One optimizer step over the global batch; returns whether any rank was told to stop.

    The loss is the mean over all trained tokens of the global batch, whatever ranks and micro batches they fall into:
    each rank's sum is divided by the global count, times the number of ranks because backends average gradients.
    """
    config, world, rows = loop.config, loop.world, loop.rows
    began, stop = time.perf_counter(), bool(loop.stop)
    torch.manual_seed(hash((config.train.seed, step, world.rank)) % 2**63)  # dropout needs no saved state to be resumed
    chosen = loop.order.rows_of(step)
    tokens = int(rows.counts[chosen].sum())
    mine = list(data.micro_batches(chosen, split(config, world.size)[0], world.rank, world.size))
    summed = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, part in enumerate(mine, 1):
        batch = data.batch(rows, part, loop.pad, device=world.device)
        value = loss.summed(loop.engine.module, batch)
        loop.backend.backward(loop.engine, value * (world.size / tokens), last=number == len(mine))
        summed += value.detach().double()
    rate = optim.learning_rate(step, loop.steps, config)
    norm = loop.backend.step(loop.engine, rate)
    agreed = total(torch.stack([summed, torch.tensor(float(stop), dtype=torch.float64, device=world.device)])).tolist()
    seconds = time.perf_counter() - began
    mean, speed = agreed[0] / tokens, int(rows.lengths[chosen].sum()) / seconds
    if not (math.isfinite(mean) and math.isfinite(norm)):  # equal on all ranks, and nothing of it is saved
        raise FloatingPointError(
            f"step {step + 1}: loss {mean}, gradient norm {norm}; go back with a smaller learning rate"
        )
    loop.metrics.write(
        step + 1,
        loss=mean,
        grad_norm=norm,
        learning_rate=rate,
        tokens=tokens,
        tokens_per_s=round(speed, 1),
        seconds=round(seconds, 4),
    )
    if step + 1 == loop.steps or _due(config.train.log_every, step + 1):
        loop.metrics.show(
            step + 1, loss=f"{mean:.4f}", norm=f"{norm:.3f}", lr=f"{rate:.2e}", **{"tokens/s": f"{speed:,.0f}"}
        )
    return agreed[1] > 0


def _evaluate(loop: Loop, step: int) -> bool:
    """Mean loss over all held-out tokens; False, and nothing written, where any rank was told to stop meanwhile."""
    world = loop.world

    def told() -> bool:
        return total(torch.tensor(float(bool(loop.stop)), device=world.device)).item() > 0

    micro = loop.config.train.micro_batch
    mine = loss.held_out(
        loop.engine.module, loop.validation, micro, loop.pad, world.device, world.rank, world.size, told
    )
    if mine is None:
        return False
    found = total(mine).tolist()
    loop.metrics.write(step, eval_loss=found[0] / found[1])
    loop.metrics.show(step, **{"held-out loss": f"{found[0] / found[1]:.4f}"})
    return True


def _save(loop: Loop, step: int) -> None:
    config, engine, backend = loop.config, loop.engine, loop.backend
    about = {
        "layout": config.parallel.name,
        "backend": config.parallel.backend.name,
        "config": digest(config),
        "torch": torch.__version__,
        "rows_seen": step * config.train.global_batch,
    }
    set_timeout(config.cluster.network.nccl_timeout_s)
    room = checkpoint.expected_bytes(engine.module)
    path = checkpoint.save(config, step, loop.world, lambda folder: backend.save(engine, folder), about, room)
    if step == loop.steps and config.train.fingerprint:
        prints = {name: checkpoint.fingerprint(value) for name, value in backend.weights(engine)}
        if loop.world.is_main:
            write_json(path / "fingerprint.json", prints)
    set_timeout(config.cluster.network.step_timeout_s)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
