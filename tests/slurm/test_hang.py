"""A rank that hangs on a real Slurm: named within the limit, with what the others wait in; the job goes on by itself."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.run_folder import attempts
from tests.slurm import runs
from tests.slurm.test_requeue import ends_as, verdicts, with_hook

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.proof]
WORDS = [
    "train.global_batch=8", "train.micro_batch=1", "train.steps=30", "train.learning_rate=3e-3", "train.precision=fp32",
    "train.fingerprint=true", "train.eval_every=10", "data.max_rows=120", "train.save_every=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(slurm, tmp_path_factory):
    """The run in which nothing hangs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.complete(run, *WORDS, "jobs=[preprocess,train]")
    return run


@pytest.fixture
def start(whole, tmp_path):
    """`start("jobs=[train]", ...)` starts a run on the rows of `whole`; it is cancelled in the end."""
    run = tmp_path / "run"

    def begin(*words: str) -> Path:
        runs.start(run, *WORDS, "jobs=[train]", *words)
        shutil.copytree(whole / "data", run / "data")
        return run

    yield begin
    runs.command("cancel", run)


def test_a_stopped_rank_is_named_and_the_job_goes_on(whole, start):
    run = start("cluster.network.step_timeout_s=10", "cluster.network.save_timeout_s=10")
    runs.wait_until(lambda: runs.step(run) >= 12)
    assert " s ago" in runs.command("status", run).stdout  # in whatever phase it was then
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
    runs.wait_until(lambda: not left_of(run))


def left_of(run: Path) -> str:
    """Ids of the watchdogs of a run: they look once a second whether there is still somebody to watch."""
    found = subprocess.run(
        ["pgrep", "-f", f"launcher.supervise.watchdog .*{run}"], capture_output=True, text=True, check=False
    )
    return found.stdout


ASLEEP = """
import builtins, os, time
real = builtins.__import__
def sleeps(name, *rest, **more):
    mine = os.environ.get("SLURM_PROCID") == "2" and os.environ.get("MUSTER_ATTEMPT") == "1"
    if name.startswith("transformers") and mine:
        time.sleep(1000)
    return real(name, *rest, **more)
builtins.__import__ = sleeps
"""
"""What Python runs first: rank 2 of the first attempt sleeps in an import."""


def test_a_rank_that_does_not_get_through_its_start_is_named(whole, start, tmp_path):
    run = start("cluster.network.nccl_timeout_s=40", with_hook(tmp_path, ASLEEP))
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["rank"], first["host"]) == ("hang", 2, "n2")
    assert "phase start, at " in first["reason"]
    assert "cluster.network.nccl_timeout_s" in first["reason"]
    assert "sleeps" in first["error"]


NO_DISK = """
import os, time
real = os.fsync
def hangs(descriptor):
    mine = os.environ.get("SLURM_PROCID") == "1" and os.environ.get("MUSTER_ATTEMPT") == "1"
    if mine and "step-00000010" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(1000)
    return real(descriptor)
os.fsync = hangs
"""
"""Rank 1 of the first attempt gets no answer from the disk when it flushes its part of the second checkpoint."""


def test_a_rank_that_does_not_get_through_a_checkpoint_is_named(whole, start, tmp_path):
    run = start("cluster.network.save_timeout_s=10", with_hook(tmp_path, NO_DISK))
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["rank"], first["host"], first["saved"]) == ("hang", 1, "n1", 5), first["reason"]
    assert "phase save, at jobs/" in first["reason"]
    assert "inside hangs (sitecustomize.py:" in first["reason"]
    assert "the others wait in " in first["reason"]
    assert json.loads((run / "jobs/train/attempt-1/hang.json").read_text())["phase"] == "save"
