"""All jobs of a run on two nodes of a real Slurm, for every layout; and what happens when a job fails."""

import re
import subprocess
from pathlib import Path

import pytest

from conf import resolve
from tests.jobs import reference
from tests.jobs.backends.test_layouts import STEPS, check
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
TRAINING = [
    "train.global_batch=16", "train.micro_batch=2", f"train.steps={STEPS}", "train.warmup_steps=5",
    "train.weight_decay=0.1", "train.learning_rate=3e-3", "train.precision=fp32", "train.fingerprint=true", "train.eval_every=0",
    "data.max_rows=240", "jobs=[preprocess,train,consolidate,evaluate]",
]  # fmt: skip


@pytest.fixture(scope="module")
def curve(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of the reference implementation."""
    run = tmp_path_factory.mktemp("reference") / "run"
    runs.complete(run, *TRAINING, "jobs=[preprocess]")
    return reference.curve(resolve.load(run / "config.yaml"), run, STEPS)


@pytest.mark.parametrize(
    "layout", ["zero3", *(pytest.param(name, marks=pytest.mark.proof) for name in ("zero1", "zero2", "fsdp", "ddp"))]
)
def test_chain_equals_the_reference(
    layout: str, curve: list[tuple[float, float]], slurm: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    runs.complete(run, *TRAINING, f"parallel={layout}")
    check(run, curve)


@pytest.mark.proof
def test_two_nodes_share_a_consolidation(curve: list[tuple[float, float]], slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shared = ["cluster.cpu.nodes=2", "cluster.cpu.ranks_per_node=2", "consolidate.shard_gib=0.001"]
    runs.complete(run, *TRAINING, "parallel=hsdp", *shared)
    check(run, curve)
    logs = "\n".join(runs.logs(run, "consolidate").values())
    written = [int(count) for count in re.findall(r"(\d+) tensors read back", logs)]
    assert len(written) == 4 and all(written) and sum(written) == 38
    assert {item["NODE_RANK"] for item in runs.environments(run, "consolidate")} == {"0", "1"}


def test_traffic_goes_over_eth0(slurm: Cluster, start: runs.Start) -> None:
    run = start("train.steps=200", "cluster.train.sbatch={nodelist: 'n[1-2]'}")
    runs.wait_until((run / "metrics.jsonl").exists)
    own = f"{slurm.addresses['n1']}:"
    seen = subprocess.run(
        ["nsenter", "--net=/var/run/netns/n1", "ss", "-Htn", "state", "established"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ends = [line.split()[-2:] for line in seen.splitlines()]
    assert ends
    assert not [end for end in ends if any(side.startswith("127.") for side in end)], seen
    assert [end for end in ends if end[0].startswith(own) and end[1].startswith(f"{slurm.addresses['n2']}:")], seen


def test_a_users_error_is_not_repeated_leaves_no_job_in_the_queue_and_says_why(
    start: runs.Start, tmp_path: Path
) -> None:
    model = runs.damaged_model(tmp_path / "model")
    overrides = [f"model.source={model}", "model.init=pretrained", "model.architecture=null"]
    run = start(*overrides, "jobs=[train,consolidate]")
    verdict = runs.final_verdict(run, "train")
    assert not runs.queue()
    assert (verdict["status"], verdict["attempt"], verdict["requeued"]) == ("user_error", 1, False)
    assert "model.source" in verdict["reason"]
    assert "would fail again" in verdict["next"]
    shown = runs.command("status", run)
    assert shown.returncode == 1
    assert re.search(r"train .*user_error .*rank \d on n\d .*model\.source", shown.stdout)


def test_gpus_that_torch_cannot_see_are_a_users_error(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runs.start(run, "pipeline=preflight", "cluster.train.gpus_per_node=2")
    verdict = runs.final_verdict(run, "preflight")
    assert verdict["status"] == "user_error"
    assert "cluster.train.gpus_per_node=2" in verdict["reason"]
    assert {item["CUDA_VISIBLE_DEVICES"] for item in runs.environments(run, "preflight")} == {"0,1"}


def test_a_killed_rank_fails_the_job(start: runs.Start) -> None:
    run = start("train.steps=2000", "cluster.max_restarts=0", "jobs=[train,consolidate]")
    runs.wait_until((run / "metrics.jsonl").exists)
    runs.kill_a_rank(run)
    verdict = runs.final_verdict(run, "train")
    assert verdict["status"] in ("failed", "nccl")
    assert verdict["exit"] != 0
    assert not runs.queue()
