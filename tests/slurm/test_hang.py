"""A rank that hangs on a real Slurm is named within the limit, with the call in which others wait. The job restarts by itself."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.run_folder import attempts
from tests.slurm import runs
from tests.slurm.cluster import Cluster
from tests.slurm.test_requeue import ends_as, verdicts, with_hook

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.proof]
OVERRIDES = [
    "train.global_batch=8", "train.micro_batch=1", "train.steps=30", "train.learning_rate=3e-3", "train.precision=fp32",
    "train.fingerprint=true", "train.eval_every=10", "data.max_rows=120", "train.save_every=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing hangs: what the others are compared with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.complete(run, *OVERRIDES, "jobs=[preprocess,train]")
    return run


@pytest.fixture
def start(whole: Path, tmp_path: Path) -> Iterator[runs.Start]:
    """`start("train.save_every=5", ...)` starts the training of `whole` with more overrides."""
    yield from runs.starter(tmp_path / "run", whole / "data", OVERRIDES)


def test_a_stopped_rank_is_named_and_the_job_restarts(whole: Path, start: runs.Start) -> None:
    run = start("cluster.network.step_timeout_s=10", "cluster.network.save_timeout_s=10")
    runs.wait_until(lambda: runs.step(run) >= 12)
    assert " s ago" in runs.command("status", run).stdout  # the last heartbeat, of any phase
    runs.stop_rank(run, 3)
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert verdicts(run) == [("hang", True), ("completed", False)]
    assert (first["rank"], first["host"]) == (3, "n2")
    line = r"rank 3 on n2 hangs: step 1\d, phase (train|evaluate|save), process stopped \(T\); the others wait in \w+ \(jobs/"
    assert re.match(line, first["reason"]), first["reason"]
    assert "restart 1 of 3" in first["next"]
    assert first["saved"] >= 5
    stacks = sorted(path.name for path in (run / "jobs/train/attempt-1").glob("*.stack"))
    assert stacks == [f"rank-{rank}.stack" for rank in range(3)]
    runs.wait_until(lambda: not watchdogs(run))


def watchdogs(run: Path) -> list[int]:
    """Process ids of a run's watchdogs. Once a second they check whether their rank still exists, and end if it does not."""
    return runs.processes(f"launcher.supervise.watchdog .*{run}")


SLEEPING_IMPORT = """
import builtins, os, time
real = builtins.__import__
def sleeps(name, *rest, **more):
    mine = os.environ.get("SLURM_PROCID") == "2" and os.environ.get("MUSTER_ATTEMPT") == "1"
    if name.startswith("transformers") and mine:
        time.sleep(1000)
    return real(name, *rest, **more)
builtins.__import__ = sleeps
"""
"""sitecustomize.py that makes rank 2 of the first attempt sleep in an import."""


def test_a_rank_that_hangs_during_startup_is_named(whole: Path, start: runs.Start, tmp_path: Path) -> None:
    run = start("cluster.network.nccl_timeout_s=40", with_hook(tmp_path, SLEEPING_IMPORT))
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["rank"], first["host"]) == ("hang", 2, "n2")
    assert "phase start, at " in first["reason"]
    assert "cluster.network.nccl_timeout_s" in first["reason"]
    assert "sleeps" in first["error"]


HANGING_FSYNC = """
import os, time
real = os.fsync
def hangs(descriptor):
    mine = os.environ.get("SLURM_PROCID") == "1" and os.environ.get("MUSTER_ATTEMPT") == "1"
    if mine and "step-00000010" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(1000)
    return real(descriptor)
os.fsync = hangs
"""
"""sitecustomize.py that makes rank 1 of the first attempt hang in fsync, for its part of the second checkpoint."""


def test_a_rank_that_hangs_in_a_checkpoint_is_named(whole: Path, start: runs.Start, tmp_path: Path) -> None:
    run = start("cluster.network.save_timeout_s=10", with_hook(tmp_path, HANGING_FSYNC))
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["rank"], first["host"], first["saved"]) == ("hang", 1, "n1", 5), first["reason"]
    assert "phase save, at jobs/" in first["reason"]
    assert "inside hangs (sitecustomize.py:" in first["reason"]
    assert "the others wait in " in first["reason"]
    assert json.loads((run / "jobs/train/attempt-1/hang.json").read_text())["phase"] == "save"
