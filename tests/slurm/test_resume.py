"""A run that Slurm asked to stop, resumed by the same command, reaches the weights of a run that was never stopped."""

import json
import time
from pathlib import Path

import pytest

from launcher import slurm as commands
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.test_chain import TRAINING

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
OVERRIDES = [*TRAINING, "train.steps=60", "jobs=[preprocess,train]", "cluster.requeue=false"]


@pytest.mark.parametrize("layout", ["fsdp", pytest.param("zero2", marks=pytest.mark.proof)])
def test_a_signalled_run_resumes_to_the_same_weights(layout: str, slurm: Cluster, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs.start(broken, *OVERRIDES, f"parallel={layout}")
    deadline = time.monotonic() + 120
    while not ((broken / "metrics.jsonl").exists() and len(runs.metrics(broken)) > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    job_id = json.loads((broken / "run.json").read_text())["launches"][-1]["jobs"]["train"]
    commands.call("scancel", "--signal=USR2", job_id)
    verdict = runs.final_verdict(broken, "train")
    assert verdict["status"] == "preempted", verdict
    assert 5 <= verdict["step"] < 60
    runs.complete(broken, *OVERRIDES, f"parallel={layout}")  # the same command
    runs.complete(whole, *OVERRIDES, f"parallel={layout}")
    prints = [json.loads((run / "checkpoints/step-00000060/fingerprint.json").read_text()) for run in (whole, broken)]
    assert prints[0] == prints[1]
    losses = [[line["loss"] for line in runs.metrics(run) if "loss" in line] for run in (whole, broken)]
    assert losses[0] == losses[1]
