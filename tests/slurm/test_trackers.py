"""A training that is killed, preempted and resumed on a real Slurm is one curve with its config in every tracker."""

from pathlib import Path

import pytest

from launcher import slurm as commands
from tests.jobs.monitoring import recorded
from tests.slurm import runs
from tests.slurm.test_requeue import ends_as, verdicts, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.proof, pytest.mark.filterwarnings("ignore")]


def test_one_curve_over_all_attempts(whole: Path, start: runs.Start) -> None:
    for name in ("wandb", "mlflow", "tensorboard"):
        pytest.importorskip(name)
    run = start("tracker=[wandb,tensorboard,mlflow]", "cluster.offline=true", "train.save_every=8")
    wait_for_step(run, 13)
    runs.kill_a_rank(run)  # steps after the checkpoint of step 8 are trained again
    runs.wait_until(lambda: (run / "jobs/train/attempt-2").exists())
    wait_for_step(run, 20)
    commands.call("scancel", "--signal=USR1", runs.job_id(run, "train"))
    ends_as(run, whole)
    assert [status for status, _ in verdicts(run)][1:] == ["preempted", "completed"]

    expected = [(line["step"], line["loss"]) for line in runs.metrics(run) if "loss" in line]
    assert [step for step, _ in expected] == list(range(1, 41))
    mlflow = recorded.mlflow_run(run, "muster")
    assert mlflow.points("loss") == expected
    assert mlflow.params["train.global_batch"] == "8" and mlflow.info.status == "FINISHED"
    points, texts = recorded.tensorboard_run(run, "loss")
    assert points == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]  # fp32
    assert "config/text_summary" in texts
    wandb = recorded.wandb_run(run, "loss")
    assert len(wandb.ids) == 1 and wandb.config["train"]["global_batch"] == 8
    assert sorted(set(wandb.points)) == expected  # its server takes the first value of a step that two files have
