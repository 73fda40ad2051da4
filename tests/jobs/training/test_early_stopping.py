"""Early stopping against transformers' own callback, and a training that it ends, whose best checkpoint is merged."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from conf.schema_training import EarlyStopping
from jobs.training.early_stopping import HeldOutLosses
from tests.jobs import ranks


def ends_at(losses: list[float], patience: int, min_delta: float) -> int | None:
    held_out = HeldOutLosses(EarlyStopping(patience, min_delta), {})
    for step, loss in enumerate(losses, 1):
        held_out.add(step, loss)
        if held_out.is_over:
            return step
    return None


def callback_ends_at(losses: list[float], patience: int, min_delta: float, folder: Path) -> int | None:
    arguments = TrainingArguments(str(folder), metric_for_best_model="eval_loss", greater_is_better=False, use_cpu=True)
    callback, state, control = EarlyStoppingCallback(patience, min_delta), TrainerState(), TrainerControl()
    for step, loss in enumerate(losses, 1):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:  # what the Trainer does after its callbacks
            state.best_metric = loss
        if control.should_training_stop:
            return step
    return None


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (2, 0.0), (3, 0.05)])
def test_it_ends_where_transformers_ends(patience: int, min_delta: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        losses = (2 - 0.05 * np.arange(20) + random.normal(0, 0.1, 20)).tolist()
        assert ends_at(losses, patience, min_delta) == callback_ends_at(losses, patience, min_delta, tmp_path)


def test_losses_of_earlier_attempts_count_and_the_one_before_training_does_not() -> None:
    held_out = HeldOutLosses(EarlyStopping(2), {0: 0.1, 4: 3.0, 8: 3.5})
    assert not held_out.is_over
    held_out.add(12, 3.4)
    assert held_out.is_over and held_out.best_step() == 4 and not held_out.is_best(12)


@pytest.mark.slow
@pytest.mark.proof
def test_a_training_ends_early_and_its_best_checkpoint_is_merged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "cluster.train.ranks_per_node=2", "train.global_batch=8", "train.steps=40", "train.learning_rate=0.5", "data.max_rows=100",
        "train.lr_schedule=linear", "train.warmup_steps=20", "train.eval_every=2", "train.early_stopping.patience=3",
        "consolidate.step=best", "train.max_loss_rise=null", "jobs=[preprocess,train,consolidate]", "cluster.train.gpus_per_node=0",
        "train.save_every=0", "train.keep_checkpoints=1", "train.fingerprint=true",
    ]  # fmt: skip
    shown = ranks.run(f"run_dir={run}", *words)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]}
    best, last = min(losses, key=losses.__getitem__), max(losses)
    assert last == best + 6 < 40
    assert (
        f"training ends at step {last}: 3 evaluations did not improve the held-out loss; the best is that of step {best}"
        in shown
    )
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [
        f"step-{best:08d}",
        f"step-{last:08d}",
    ]
    assert (run / f"checkpoints/step-{last:08d}/fingerprint.json").exists()
    assert json.loads((run / "model/muster.json").read_text())["checkpoint"] == f"step-{best:08d}"
    again = ranks.run(f"resume={run}", "consolidate.step=null")  # nothing is left to train
    assert f"step {last + 1}/" not in again
