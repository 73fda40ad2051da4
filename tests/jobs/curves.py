"""Trains several configs on real ranks with the same tokenized rows, which runs through launch.py would make again each time."""

import gc
import json
import shutil
from copy import deepcopy
from pathlib import Path

import torch

from conf.schema import Config
from jobs import train, train_step
from jobs.distributed import stop_signals
from jobs.distributed.process_group import World, process_group
from tests.conftest import put
from tests.jobs.ranks import spawn

SMALL = [
    "cluster.train.ranks_per_node=4", "train.global_batch=16", "train.micro_batch=2", "train.steps=6", "train.warmup_steps=2",
    "train.weight_decay=0.1", "train.learning_rate=3e-3", "train.precision=fp32", "cluster.train.gpus_per_node=0",
    "data.max_rows=120", "train.eval_every=0", "train.log_every=100",
]  # fmt: skip
"""A training of seconds on four ranks, with a learning rate high enough that a wrong gradient changes the loss."""


def train_each(configs: list[Config], world: int = 4) -> list[list[dict[str, float]]]:
    """Train each config on `world` new ranks, without launcher and other jobs; returns the lines of each metrics.jsonl."""
    metrics = []
    for config in configs:
        spawn(_rank, world, config)
        lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in lines])
    return metrics


def _rank(_: int, config: Config) -> None:
    train.run(config)


def train_on_rank(_: int, configs: list[Config]) -> None:
    """Train each config whole, in the process group of one rank: a function for `spawn`."""
    torch.set_num_threads(1)
    with process_group(configs[0]) as world:
        for config in configs:
            training, step = train._set_up(config, world, stop_signals.StopFlag())
            train._train(training, step)
            training.metrics.close()


def train_here(config: Config, world: World, steps: int, *, save: bool = False) -> None:
    """Train on a rank whose process group is there already, so that many configs take one start. Nothing is evaluated."""
    training, step = train._set_up(config, world, stop_signals.StopFlag())
    while step < steps:
        train_step.run(training, step)
        step += 1
    if save:
        train._save_checkpoint(training, step, wait=True)
    training.metrics.close()
    del training
    gc.collect()


def points(run: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def differences(actual: list[tuple[float, float]], expected: list[tuple[float, float]]) -> list[float]:
    """For each step, the larger relative difference of loss and gradient norm."""
    return [
        max(abs(value - right) / right for value, right in zip(step, right_step, strict=True))
        for step, right_step in zip(actual, expected, strict=True)
    ]


def runs(config: Config, data: Path, folder: Path, cases: dict[str, dict[str, object]]) -> list[Config]:
    """A config for each case: `config` with the case's values, in a run folder with a copy of the tokenized rows in `data`."""
    configs = []
    for name, values in cases.items():
        run = folder / name
        shutil.copytree(data, run / "data")
        configs.append(put(deepcopy(config), {"run_dir": str(run), **values}))
    return configs


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]
