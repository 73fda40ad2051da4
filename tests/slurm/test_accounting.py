"""Submission, states, status and logs on a cluster with accounting (sacct works) and on one without."""

import subprocess
import sys

import pytest

from launcher import slurm
from tests.slurm import cluster, machine, runs

pytestmark = pytest.mark.slurm


@pytest.fixture
def own_cluster(request, monkeypatch):
    """A cluster of this test's own, with or without a database."""
    if reason := cluster.available(request.param):
        pytest.skip(reason)
    if up := [root for root in machine.roots() if cluster.running(root)]:
        pytest.skip(f"A cluster is up in {up[0]}, and a machine has room for one: take it down to run this.")
    started = cluster.up(accounting=request.param)
    monkeypatch.setenv("SLURM_CONF", str(started.conf))
    yield request.param
    started.down()


def _muster(*words):
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words], capture_output=True, text=True, cwd=runs.CLONE, check=False
    )


@pytest.mark.parametrize("own_cluster", [True, False], ids=["slurmdbd", "none"], indirect=True)
def test_a_run_is_followed_with_and_without_accounting(own_cluster, tmp_path):
    run = tmp_path / "run"
    runs.complete(run, "pipeline=preprocess", "data.max_rows=50")
    (job,) = runs.state.job_states(run)
    assert job.state == "COMPLETED"
    if own_cluster:
        assert job.job_id in slurm.call("sacct", "--noheader", "--allocations", "--format=JobID", "--jobs", job.job_id)
    else:
        with pytest.raises(slurm.SlurmError):
            slurm.call("sacct", "--jobs", job.job_id)
    shown = _muster("status", run)
    assert shown.returncode == 0, shown.stderr
    assert "preprocess" in shown.stdout
    assert "completed" in shown.stdout
    assert "sample: alpaca, because" in _muster("logs", run, "--job", "preprocess").stdout
    assert "no log of train" in _muster("logs", run).stderr
