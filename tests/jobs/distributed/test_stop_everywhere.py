"""A training that is told to stop during an evaluation: it stops there, and makes up for it when it is resumed."""

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


def stopped_at(rank: int, config: str, step: int, said: str) -> None:
    """Train, and signal rank 1 alone as the evaluation at `step` begins."""
    from jobs import run, train

    evaluate = train._evaluate

    def signalled(training, at):
        if (at, rank) == (step, 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(training, at)

    train._evaluate = signalled
    with pytest.raises(Stopped, match=f"told to stop by SIGUSR1; {said}") as caught:
        run("train", config)
    assert caught.value.status == "preempted"


def on_to_the_end(rank: int, config: str) -> None:
    from jobs import run

    run("train", config)


def lines(run: Path) -> list[tuple[object, ...]]:
    return [tuple(item.get(name) for name in ("step", "loss", "grad_norm", "eval_loss")) for item in metrics(run)]


def test_an_evaluation_is_cut_short_and_made_up_for(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ranks.run(f"run_dir={whole}", *WORDS, "jobs=[preprocess,train]")
    ranks.run(f"run_dir={broken}", *WORDS, "jobs=[preprocess]")
    config = str(broken / "config.yaml")
    for step, said in ((0, "nothing to save yet"), (3, "saved at step 3 of 6"), (6, "saved at step 6 of 6")):
        ranks.spawn(stopped_at, 2, config, step, said)
        assert step not in [line[0] for line in lines(broken) if line[3] is not None]
    ranks.spawn(on_to_the_end, 2, config)
    assert lines(broken) == lines(whole)
    assert [line[0] for line in lines(broken) if line[3] is not None] == [0, 3, 6]
    assert read_json(broken / "checkpoints" / STEP) == read_json(whole / "checkpoints" / STEP)
