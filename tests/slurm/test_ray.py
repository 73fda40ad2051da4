"""Programs of Ray Train on a real Slurm: one that fails, one that hangs, and two jobs on the same nodes at one time."""

import importlib.util
import re
from pathlib import Path

import pytest

from launcher.run_folder import attempts
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.proof,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: make custom"),
]
PROGRAM = """
import os, time, torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from muster import beat

def wait_for_rows():
    time.sleep(1000)

def work():
    rank = train.get_context().get_world_rank()
    print(f"I am rank {rank}", flush=True)
    beat(1)
    ACTION

TorchTrainer(
    work,
    torch_config=TorchConfig("gloo"),
    scaling_config=train.ScalingConfig(num_workers=int(os.environ["MUSTER_RANKS"])),
    run_config=train.RunConfig(name="checkpoints", storage_path=os.environ["MUSTER_RUN"]),
).fit()
"""


def start(run: Path, action: str, *overrides: str) -> None:
    """Submit a program of Ray Train in which every worker does `action`."""
    program = run.with_suffix(".py")
    program.write_text(PROGRAM.replace("ACTION", action))
    runs.start(
        run, "jobs=[custom]", "custom.launcher=ray", f'custom.command="{program}"', "cluster.requeue=false", *overrides
    )


def left_behind(run: Path) -> list[int]:
    """Processes of Ray of this run."""
    logs = run / "jobs/custom/attempt-1/ray/node-0.log"
    folder = re.search(r"(/\S+)/ray/session_", logs.read_text())
    assert folder, logs.read_text()
    return runs.processes(f"{folder[1]}/ray")


def test_a_worker_that_fails_is_named(slurm: Cluster, tmp_path: Path) -> None:
    start(tmp_path / "run", "if rank == 2: raise ValueError('no such column')")
    verdict = runs.final_verdict(tmp_path / "run", "custom", timeout_s=400)
    assert (verdict["status"], verdict["rank"]) == ("failed", 2), verdict
    assert verdict["reason"].startswith("ValueError: no such column"), verdict
    assert not left_behind(tmp_path / "run")


def test_a_worker_that_hangs_is_named(slurm: Cluster, tmp_path: Path) -> None:
    start(
        tmp_path / "run",
        "wait_for_rows() if rank == 2 else torch.distributed.barrier()",
        "cluster.network.step_timeout_s=20",
    )
    verdict = runs.final_verdict(tmp_path / "run", "custom", timeout_s=400)
    assert verdict["status"] == "hang", verdict
    assert "wait_for_rows" in verdict["reason"], verdict
    assert not left_behind(tmp_path / "run")


def test_two_jobs_on_the_same_nodes_complete(slurm: Cluster, tmp_path: Path) -> None:
    both = [tmp_path / "a", tmp_path / "b"]
    for run in both:
        start(run, "time.sleep(20)", "cluster.train.ranks_per_node=1", "cluster.train.sbatch={nodelist: 'n[1-2]'}")
    for run in both:
        assert runs.final_verdict(run, "custom", timeout_s=400)["status"] == "completed"
        assert [f"I am rank {rank}\n" in runs.logs(run, "custom")[rank] for rank in (0, 1)] == [True, True]
        assert not left_behind(run)
    times = [attempts.verdicts(run / "jobs/custom")[0] for run in both]
    assert max(item["started"] for item in times) < min(item["ended"] for item in times)
