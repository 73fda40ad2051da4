"""Submission, job states, status and logs, on a cluster with accounting (sacct works) and on one without."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import slurm
from tests.slurm import cluster, machine, runs

pytestmark = pytest.mark.slurm


@pytest.fixture
def own_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Start a cluster for this test only, with or without a database. Yields whether it has one."""
    if reason := cluster.available(request.param):
        pytest.skip(reason)
    if up := [root for root in machine.roots() if cluster.running(root)]:
        pytest.skip(
            f"A cluster is already up in {up[0]}, and a machine has room for one: take it down with make slurm-down."
        )
    started = cluster.up(accounting=request.param)
    monkeypatch.setenv("SLURM_CONF", str(started.conf))
    yield request.param
    started.down()


@pytest.mark.parametrize("own_cluster", [True, False], ids=["slurmdbd", "none"], indirect=True)
def test_states_and_logs_with_and_without_accounting(own_cluster: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.complete(run, "pipeline=preprocess", "data.max_rows=50")
    [job] = runs.job_states(run).values()
    assert job.state == "COMPLETED"
    if own_cluster:
        assert job.job_id in slurm.call("sacct", "--noheader", "--allocations", "--format=JobID", "--jobs", job.job_id)
    else:
        with pytest.raises(slurm.SlurmError):
            slurm.call("sacct", "--jobs", job.job_id)
    shown = runs.command("status", run)
    assert shown.returncode == 0, shown.stderr
    assert "preprocess" in shown.stdout
    assert "completed" in shown.stdout
    assert "sample: alpaca, because" in runs.command("logs", run, "--job", "preprocess").stdout
    assert "no log of train" in runs.command("logs", run).stderr
    used = runs.command("efficiency", run)
    assert used.returncode == 0, used.stderr
    assert ("accounting does not answer (Slurm accounting storage is disabled)" in used.stdout) == (not own_cluster)
    assert re.search(r"^preprocess +1 +0:00:\d\d .* 1 +\d+%", used.stdout, re.MULTILINE), used.stdout
