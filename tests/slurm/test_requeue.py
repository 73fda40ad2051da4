"""An interrupted training restarts by itself and reaches the weights of one that was not interrupted. Or it ends and says why."""

import shutil
import subprocess
from functools import partial
from pathlib import Path
from random import Random

import pytest

from launcher import hostlist
from launcher import slurm as commands
from launcher.run_folder import attempts
from launcher.supervise import requeue
from tests.slurm import faults, runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def wait_for_step(run: Path, step: int) -> None:
    runs.wait_until(lambda: runs.step(run) >= step)


def verdicts(run: Path) -> list[tuple[str, bool]]:
    """(status, whether it was requeued) of each attempt."""
    return [(item["status"], item.get("requeued", False)) for item in attempts.verdicts(run / "jobs/train")]


def ends_as(run: Path, whole: Path) -> None:
    """Wait for the end: the run must complete, with every step once, and with the losses and weights of `whole`."""
    assert runs.final_verdict(run, "train")["status"] == "completed", verdicts(run)
    assert runs.curve(run) == runs.curve(whole)
    assert runs.fingerprints(run) == runs.fingerprints(whole)


@pytest.mark.proof
@pytest.mark.parametrize(
    "options", [["--signal=USR1"], ["--signal=USR1", "--batch"]], ids=["to the ranks", "to the script"]
)
def test_a_signalled_training_restarts_and_the_next_job_waits_for_its_end(
    whole: Path, start: runs.Start, options: list[str]
) -> None:
    run = start("jobs=[train,consolidate]")
    wait_for_step(run, 5)
    commands.call("scancel", *options, runs.job_id(run, "train"))
    runs.wait_until(lambda: (run / "jobs/train/attempt-1.json").exists())
    states = runs.job_states(run)
    assert (states["train"].state in commands.LIVE_STATES, states["train"].failed) == (True, False)
    assert states["consolidate"].state == "PENDING"
    ends_as(run, whole)
    assert verdicts(run) == [("preempted", True), ("completed", False)]
    train, consolidate = (attempts.last_verdict(run / "jobs" / name) for name in ("train", "consolidate"))
    assert train and consolidate
    assert consolidate["status"] == "completed"
    assert consolidate["started"] >= train["ended"]


def with_hook(tmp_path: Path, code: str) -> str:
    """An override that makes every Python process of the job execute `code` first, as sitecustomize.py."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(code)
    return f"cluster.environment={{PYTHONPATH: {tmp_path}/hook}}"


SLOW = """
import sys, time
real = time.perf_counter
def slow():
    if sys._getframe(1).f_globals.get("__name__") == "jobs.train_step":
        time.sleep(0.3)
    return real()
time.perf_counter = slow
"""
"""sitecustomize.py that makes each step 0.6 s slower: a step reads the clock twice."""


@pytest.mark.proof
def test_a_training_at_its_time_limit_restarts(whole: Path, start: runs.Start, tmp_path: Path) -> None:
    run = start("cluster.train.time_min=1", "cluster.signal_s=25", with_hook(tmp_path, SLOW))
    ends_as(run, whole)
    statuses = [status for status, _ in verdicts(run)]
    assert len(statuses) > 1
    assert set(statuses[:-1]) == {"time_limit"}


@pytest.mark.proof
def test_a_killed_rank_restarts_training_from_its_checkpoint(whole: Path, start: runs.Start) -> None:
    run = start("train.save_every=5")
    wait_for_step(run, 13)
    runs.kill_a_rank(run)
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["requeued"]) == ("failed", True)
    assert "(Killed)" in first["reason"]
    assert first["host"] in ("n1", "n2")
    assert first["saved"] >= 10


def test_a_hanging_rank_restarts_training_from_its_checkpoint(whole: Path, start: runs.Start) -> None:
    run = start("train.save_every=5", "cluster.network.step_timeout_s=10", "cluster.network.save_timeout_s=10")
    wait_for_step(run, 8)
    runs.stop_rank(run, 1)
    ends_as(run, whole)
    assert verdicts(run) == [("hang", True), ("completed", False)]
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["rank"], first["host"]) == (1, "n2")
    assert "process stopped (T); rank 0 waits in " in first["reason"]


@pytest.mark.proof
def test_a_training_that_keeps_failing_ends(start: runs.Start) -> None:
    run = start("cluster.max_restarts=1", "jobs=[train,consolidate]")

    def has_a_step(log: Path) -> bool:
        return log.exists() and "step" in log.read_text()

    for number in (1, 2):
        runs.wait_until(partial(has_a_step, run / f"jobs/train/attempt-{number}/rank-0.log"))
        runs.kill_a_rank(run)
        runs.wait_until((run / f"jobs/train/attempt-{number}.json").exists)
    verdict = runs.final_verdict(run, "train")
    assert verdicts(run) == [("failed", True), ("failed", False)]
    assert "cluster.max_restarts=1" in verdict["next"]
    assert runs.job_states(run)["consolidate"].state == "CANCELLED"
    shown = runs.command("why", run).stdout
    assert "cluster.max_restarts=1" in shown
    assert "attempt 1 failed" in shown


@pytest.mark.proof
@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_training_stopped_by_the_user_is_saved_and_does_not_restart(start: runs.Start, how: str) -> None:
    run = start("train.steps=4000")
    wait_for_step(run, 3)
    assert runs.command(how, run).returncode == 0
    verdict = runs.final_verdict(run, "train")
    assert verdicts(run) == [("stopped", False)]
    assert verdict["saved"] == verdict["step"] >= 3
    shown = runs.command("status", run)
    assert shown.returncode == 1
    assert "stopped" in shown.stdout
    assert "stopped on request" in shown.stdout


@pytest.mark.proof
def test_a_stopped_training_is_resumed_by_hand(whole: Path, start: runs.Start) -> None:
    run = start()
    wait_for_step(run, 3)
    runs.command("stop", run)
    runs.finish(run)
    assert runs.command("resume", run).returncode == 0
    ends_as(run, whole)


def test_a_preempted_training_restarts_when_nodes_are_free_again(whole: Path, start: runs.Start) -> None:
    run = start("cluster.train.partition=gpu", "cluster.train.exclusive=true")
    wait_for_step(run, 5)
    commands.call("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    ends_as(run, whole)
    assert verdicts(run) == [("preempted", True), ("completed", False)]


BROKEN = """
import builtins, os
real = builtins.__import__
def fails(name, *rest, **more):
    if name.startswith("torch") and os.environ.get("SLURMD_NODENAME") == "n2" and "SLURM_PROCID" in os.environ:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    return real(name, *rest, **more)
builtins.__import__ = fails
"""
"""sitecustomize.py that makes every rank on n2 fail like one with a broken GPU."""


@pytest.mark.proof
def test_a_training_excludes_a_bad_node(whole: Path, start: runs.Start, tmp_path: Path) -> None:
    run = start(with_hook(tmp_path, BROKEN), "cluster.train.sbatch={exclude: n4}")
    runs.wait_until(lambda: any("without n2" in item.get("next", "") for item in attempts.verdicts(run / "jobs/train")))
    job = commands.show_job(runs.job_id(run, "train"))
    assert sorted(hostlist.expand(job["ExcNodeList"])) == ["n2", "n4"]
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["host"], first["requeued"]) == ("bad_node", "n2", True)
    assert "without n2" in first["next"]


@pytest.mark.proof
def test_without_requeue_the_verdict_says_so(start: runs.Start) -> None:
    run = start("cluster.requeue=false")
    wait_for_step(run, 3)
    commands.call("scancel", "--signal=USR1", runs.job_id(run, "train"))
    assert "cluster.requeue=false" in runs.final_verdict(run, "train")["next"]
    assert verdicts(run) == [("preempted", False)]


@pytest.mark.proof
def test_a_killed_batch_script_restarts_training(whole: Path, start: runs.Start, slurm: Cluster) -> None:
    run = start("jobs=[train,consolidate]")
    wait_for_step(run, 5)
    faults.kill_script(faults.Scene(run, slurm, Random(0)))
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["requeued"]) == ("preempted", True)
    assert "its batch script was killed" in first["reason"]
    assert runs.final_verdict(run, "consolidate")["status"] == "completed"


@pytest.mark.proof
def test_a_lost_node_restarts_training_elsewhere(whole: Path, start: runs.Start, slurm: Cluster) -> None:
    run = start("train.save_every=5")
    wait_for_step(run, 8)
    slurm.crash("n2")
    try:
        ends_as(run, whole)
        assert slurm.node_states()["n2"].startswith("down")
    finally:
        slurm.start_slurmd("n2")
        runs.wait_until(lambda: slurm.node_states()["n2"] == "idle")
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["host"], first["next"]) == ("bad_node", "n2", requeue.BY_SLURM)


@pytest.mark.proof
def test_an_attempt_that_slurm_ends_without_a_signal_has_a_verdict(whole: Path, start: runs.Start) -> None:
    run = start("train.save_every=5")
    wait_for_step(run, 7)
    commands.call("scontrol", "requeue", runs.job_id(run, "train"))
    ends_as(run, whole)
    assert verdicts(run)[0] == ("preempted", True)


@pytest.mark.proof
def test_a_run_that_was_deleted_ends_and_does_not_come_back(start: runs.Start) -> None:
    run = start("train.steps=4000")
    wait_for_step(run, 3)
    job_id = runs.job_id(run, "train")
    run.rename(run.with_name("moved"))
    shutil.rmtree(run.with_name("moved"))
    runs.wait_until(lambda: commands.show_job(job_id)["JobState"] == "FAILED")
    assert commands.show_job(job_id)["Restarts"] == "0"
    assert not run.exists()


@pytest.mark.proof
def test_a_script_submitted_by_hand_is_requeued(whole: Path, start: runs.Start) -> None:
    """`sbatch` by hand, of the script that submit=script has written, gives the same job."""
    run = start("submit=script")
    done = subprocess.run(
        ["sbatch", "--parsable", run / "jobs/train.sbatch"], capture_output=True, text=True, check=True
    )
    wait_for_step(run, 5)
    commands.call("scancel", "--signal=USR2", done.stdout.strip())
    ends_as(run, whole)
    assert verdicts(run) == [("preempted", True), ("completed", False)]
