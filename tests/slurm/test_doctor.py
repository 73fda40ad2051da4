"""`muster doctor --cluster NAME` on a real Slurm: the checks of the login node and of a node of each partition, side by side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.proof]
CLUSTER = """\
name: site
executor: slurm
train: {partition: gpu, ranks_per_node: 2, gpus_per_node: 0, cpus_per_rank: 1, memory_gib: null, time_min: 20, exclusive: false}
cpu: {partition: cpu, cpus_per_rank: 1, memory_gib: null, time_min: 20}
inference: {partition: gpu, gpus_per_node: 0, cpus_per_rank: 1, memory_gib: null, time_min: 20}
"""


def doctor(folder: Path, cluster: str) -> "subprocess.CompletedProcess[str]":
    (folder / ".config/muster/conf/cluster").mkdir(parents=True, exist_ok=True)
    (folder / ".config/muster/conf/cluster/site.yaml").write_text(cluster)
    return subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", "--cluster", "site"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"HOME": str(folder), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )


def test_the_checks_run_on_a_node_of_each_partition(slurm: Cluster, tmp_path: Path) -> None:
    done = doctor(tmp_path, CLUSTER)
    rows = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows[0].startswith("login node")
    assert "train, inference on n" in rows[0]
    assert "cpu on n" in rows[0]
    assert any(row.split()[:5] == ["ok", "ok", "ok", "training:", "torch"] for row in rows)
    assert any("preflight: ranks  2 on cpu: matrix products" in row for row in rows)
    assert "node of cpu" in done.stderr
    broken = doctor(tmp_path, CLUSTER + 'setup: ["ulimit -n 512"]\npython: /no/such/python\n')
    assert broken.returncode == 1
    assert "without an answer" in broken.stdout
    assert "/no/such/python" in broken.stdout
