"""A run that Slurm asked to stop, resumed by the same command, reaches the weights of a run that was never stopped."""

from pathlib import Path

import pytest

from launcher import slurm as commands
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import OVERRIDES
from tests.slurm.test_requeue import ends_as, wait_for_step

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_a_signalled_run_resumes_to_the_same_weights(whole: Path, start: runs.Start) -> None:
    stop_and_repeat(start("cluster.requeue=false"), whole, [*OVERRIDES, "jobs=[train]", "cluster.requeue=false"])


@pytest.mark.proof
def test_a_signalled_run_under_zero_resumes_to_the_same_weights(slurm: Cluster, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    overrides = [*OVERRIDES, "jobs=[preprocess,train]", "cluster.requeue=false", "parallel=zero2"]
    runs.complete(whole, *overrides)
    runs.start(broken, *overrides)
    stop_and_repeat(broken, whole, overrides)


def stop_and_repeat(run: Path, whole: Path, overrides: list[str]) -> None:
    """Stop a training with Slurm's signal, then launch it again with the same command, and compare it with `whole`."""
    wait_for_step(run, 5)
    commands.call("scancel", "--signal=USR2", runs.job_id(run, "train"))
    verdict = runs.final_verdict(run, "train")
    assert verdict["status"] == "preempted", verdict
    assert 5 <= verdict["step"] < 40
    runs.start(run, *overrides)
    ends_as(run, whole)
