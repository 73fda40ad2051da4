"""A training that gets a stop signal during an evaluation stops there, and repeats the evaluation when it is resumed."""

import os
import signal
from pathlib import Path

import pytest

from conf.errors import Stopped
from conf.files import read_json
from launcher.run_folder.attempts import metrics
from tests.jobs import ranks

pytestmark = pytest.mark.proof
WORDS = [
    "cluster.train.ranks_per_node=2", "cluster.train.gpus_per_node=0", "train.steps=6", "train.eval_every=3", "train.save_every=0",
    "train.global_batch=8", "train.precision=fp32", "train.fingerprint=true", "train.warmup_steps=0", "data.max_rows=120",
]  # fmt: skip
STEP = "step-00000006/fingerprint.json"


def stopped_at(rank: int, config: str, step: int, expected: str) -> None:
    """Train, and signal only rank 1 when the evaluation at `step` begins."""
    from jobs import run, train

    evaluate = train._evaluate

    def signalled(training, at):
        if (at, rank) == (step, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(training, at)

    train._evaluate = signalled
    with pytest.raises(Stopped, match=f"told to stop by SIGUSR1; {expected}") as caught:
        run("train", config)
    assert caught.value.status == "preempted"


def train_to_the_end(rank: int, config: str) -> None:
    from jobs import run

    run("train", config)


def lines(run: Path) -> list[tuple[object, ...]]:
    return [tuple(item.get(name) for name in ("step", "loss", "grad_norm", "eval_loss")) for item in metrics(run)]


def test_an_interrupted_evaluation_is_repeated(tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ranks.run(f"run_dir={whole}", *WORDS, "jobs=[preprocess,train]")
    ranks.run(f"run_dir={broken}", *WORDS, "jobs=[preprocess]")
    config = str(broken / "config.yaml")
    for step, expected in ((0, "nothing to save yet"), (3, "saved at step 3 of 6"), (6, "saved at step 6 of 6")):
        ranks.spawn(stopped_at, 2, config, step, expected)
        assert step not in [line[0] for line in lines(broken) if line[3] is not None]
    ranks.spawn(train_to_the_end, 2, config)
    assert lines(broken) == lines(whole)
    assert [line[0] for line in lines(broken) if line[3] is not None] == [0, 3, 6]
    assert read_json(broken / "checkpoints" / STEP) == read_json(whole / "checkpoints" / STEP)
