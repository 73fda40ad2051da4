"""A training that is interrupted and resumed ends with exactly the same weights, optimizer state and metrics as one that is not."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from conf.errors import Stopped
from conf.files import read_json
from conf.schema import Config
from jobs import preprocess, train, train_step
from tests.jobs.curves import SMALL, runs
from tests.jobs.ranks import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS, WORLD = 6, 4
WORDS = [*SMALL, f"train.steps={STEPS}", "train.save_every=2", "train.keep_checkpoints=9", "train.fingerprint=true"]
LAYOUTS = {"fsdp": [], "hsdp": ["parallel.shard_ranks=2"], "zero1": [], "zero2": [], "zero3": []}


def phase(rank: int, config: Config, signalled: tuple[int, int] | None) -> None:
    """Resume and train: to the end, or until one rank gets a signal just before the given step."""
    torch.use_deterministic_algorithms(True)
    real, stopped = train_step.run, None

    def step(training, number):
        if (number, rank) == signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(training, number)

    train_step.run = step
    try:
        train.run(config)
    except Stopped as error:
        stopped = str(error)
    assert bool(stopped) == bool(signalled)
    assert not signalled or f"SIGUSR1; saved at step {signalled[0] + 1} of {STEPS}" in str(stopped)


def record(run: Path) -> list[tuple[object, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in ("step", "loss", "grad_norm", "eval_loss")) for line in lines]


def shards(run: Path) -> dict[str, object]:
    """Size and checksums of every file with weights or optimizer state."""
    files = read_json(run / f"checkpoints/step-{STEPS:08d}/manifest.json")["files"]
    return {name: entry for name, entry in files.items() if name.endswith((".distcp", "_optim_states.pt"))}


def check(config: Config, folder: Path, ranks: int, stops: list[tuple[int, int]]) -> None:
    """Train once to the end and once with `stops`, each a step and the rank that gets the signal; compare the results."""
    preprocess.run(config)
    whole, broken = runs(config, folder / "data/data", folder, {"whole": {}, "broken": {}})
    for config, signalled in [(whole, None), *((broken, stop) for stop in stops), (broken, None)]:
        spawn(phase, ranks, config, signalled)  # new processes, as a requeue has them
    before, after = Path(whole.run_dir), Path(broken.run_dir)
    last = f"checkpoints/step-{STEPS:08d}/fingerprint.json"
    assert read_json(after / last) == read_json(before / last)
    assert len(shards(before)) == ranks
    assert shards(after) == shards(before)
    assert record(after) == record(before)


def test_one_interruption_changes_nothing(compose, tmp_path) -> None:
    words = [*WORDS, "parallel=fsdp", "cluster.train.ranks_per_node=2"]
    check(compose(f"run_dir={tmp_path}/data", *words), tmp_path, 2, [(2, 1)])


@pytest.mark.proof
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_interruptions_change_nothing(layout, adapter, compose, tmp_path) -> None:
    words = [*WORDS, f"parallel={layout}", *LAYOUTS[layout], f"adapter={adapter}"]
    chance = random.Random(f"{layout} {adapter}")
    stops = [(number, chance.randrange(WORLD)) for number in sorted(chance.sample(range(STEPS - 1), 3))]
    check(compose(f"run_dir={tmp_path}/data", *words), tmp_path, WORLD, stops)
