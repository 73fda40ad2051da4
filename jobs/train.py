"""Training, read from top to bottom: build, shard, resume, then steps until they are done or someone says stop."""

import math
import time
from pathlib import Path
from types import ModuleType

import torch

from conf.batch import split
from conf.errors import Stopped
from conf.files import write_json
from conf.resolve import digest
from conf.schema import Config
from jobs import backends, checkpoint, data, loss, model, optim, signals
from jobs.backends import Engine
from jobs.distributed import World, process_group, set_timeout, total
from jobs.metrics import Metrics


def run(config: Config) -> None:
    """Train to the last step and leave a sharded checkpoint. Raises Stopped, after saving, when a signal asked for it."""
    with signals.watched() as stop, process_group(config) as world:
        folder = Path(config.run_dir) / "data"
        rows = data.read(folder, "train", config.data.max_length if config.data.packing else None)
        validation = data.read(folder, "validation")
        steps = config.train.steps or max(
            1, math.ceil((config.train.epochs or 1) * len(rows) / config.train.global_batch)
        )
        pad = model.tokenizer(config).pad_token_id
        backend = backends.chosen(config)
        engine = backend.wrap(model.build(config), config, world)
        step = checkpoint.resume(config, world, lambda path: backend.load(engine, path))
        metrics = Metrics(config, world, steps, step)
        if step == 0:
            _evaluate(engine, validation, step, pad, config, world, metrics)
        set_timeout(config.cluster.network.step_timeout_s)
        stopped = False
        while step < steps and not stopped:
            stopped = _step(backend, engine, rows, step, steps, pad, config, world, metrics, bool(stop))
            step += 1
            if step == steps or stopped or _due(config.train.save_every, step):  # first: time may be short
                _save(backend, engine, step, steps, config, world)
            if step == steps or (_due(config.train.eval_every, step) and not stopped):
                _evaluate(engine, validation, step, pad, config, world, metrics)
        metrics.close()
    if step < steps:
        raise Stopped(
            "preempted",
            f"told to stop by {stop.signal.name if stop.signal else 'another rank'}; saved at step {step} of {steps}",
        )


def _step(
    backend: ModuleType,
    engine: Engine,
    rows: data.Rows,
    step: int,
    steps: int,
    pad: int,
    config: Config,
    world: World,
    metrics: Metrics,
    stop: bool,
) -> bool:
    """One optimizer step over the global batch; returns whether any rank was told to stop.

    The loss is the mean over all trained tokens of the global batch, whatever ranks and micro batches they fall into:
    each rank's sum is divided by the global count, times the number of ranks because backends average gradients.
    """
    began = time.perf_counter()
    torch.manual_seed(hash((config.train.seed, step, world.rank)) % 2**63)  # dropout needs no saved state to be resumed
    chosen = data.at_step(rows, step, config.train.global_batch, config.data.seed)
    tokens = int(rows.counts[chosen].sum())
    mine = list(data.micro_batches(chosen, split(config, world.size)[0], world.rank, world.size))
    summed = torch.zeros((), dtype=torch.float64, device=world.device)
    for number, part in enumerate(mine, 1):
        batch = {name: value.to(world.device, non_blocking=True) for name, value in data.batch(rows, part, pad).items()}
        value = loss.summed(engine.module, batch)
        backend.backward(engine, value * (world.size / tokens), last=number == len(mine))
        summed += value.detach().double()
    rate = optim.learning_rate(step, steps, config)
    norm = backend.step(engine, rate)
    agreed = total(torch.stack([summed, torch.tensor(float(stop), dtype=torch.float64, device=world.device)])).tolist()
    seconds = time.perf_counter() - began
    mean, speed = agreed[0] / tokens, int(rows.lengths[chosen].sum()) / seconds
    if not (math.isfinite(mean) and math.isfinite(norm)):  # equal on all ranks, and nothing of it is saved
        raise FloatingPointError(
            f"step {step + 1}: loss {mean}, gradient norm {norm}; go back with a smaller learning rate"
        )
    metrics.write(
        step + 1,
        loss=mean,
        grad_norm=norm,
        learning_rate=rate,
        tokens=tokens,
        tokens_per_s=round(speed, 1),
        seconds=round(seconds, 4),
    )
    if step + 1 == steps or _due(config.train.log_every, step + 1):
        metrics.show(
            step + 1, loss=f"{mean:.4f}", norm=f"{norm:.3f}", lr=f"{rate:.2e}", **{"tokens/s": f"{speed:,.0f}"}
        )
    return agreed[1] > 0


def _evaluate(
    engine: Engine, validation: data.Rows, step: int, pad: int, config: Config, world: World, metrics: Metrics
) -> None:
    """Mean loss over all held-out tokens."""
    found = total(
        loss.held_out(engine.module, validation, config.train.micro_batch, pad, world.device, world.rank, world.size)
    ).tolist()
    metrics.write(step, eval_loss=found[0] / found[1])
    metrics.show(step, **{"held-out loss": f"{found[0] / found[1]:.4f}"})


def _save(backend: ModuleType, engine: Engine, step: int, steps: int, config: Config, world: World) -> None:
    about = {
        "layout": config.parallel.name,
        "backend": config.parallel.backend.name,
        "config": digest(config),
        "torch": torch.__version__,
    }
    set_timeout(config.cluster.network.nccl_timeout_s)
    path = checkpoint.save(config, step, world, lambda folder: backend.save(engine, folder), about)
    if step == steps and config.train.fingerprint:
        prints = {name: checkpoint.fingerprint(value) for name, value in backend.weights(engine)}
        if world.is_main:
            write_json(path / "fingerprint.json", prints)
    set_timeout(config.cluster.network.step_timeout_s)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
