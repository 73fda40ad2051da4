"""Trains several configs on real ranks with the same tokenized rows, which runs through launch.py would make again each time."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

from conf.schema import Config
from jobs import train
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
