"""A training that is interrupted goes on by itself, to the weights of one that was not; or it ends, and says why."""

import subprocess
from pathlib import Path
from random import Random

import pytest

from launcher import slurm as commands
from launcher.run_folder import attempts
from launcher.supervise import requeue
from tests.slurm import faults, runs

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def trained(run: Path, steps: int) -> None:
    runs.wait_until(lambda: runs.step(run) >= steps)


def verdicts(run: Path) -> list[tuple[str, bool]]:
    return [(item["status"], item.get("requeued", False)) for item in attempts.verdicts(run / "jobs/train")]


def ends_as(run: Path, whole: Path) -> None:
    """It completed, with every step once, and the losses and weights of `whole`."""
    jobs = runs.finish(run)
    assert jobs["train"].verdict["status"] == "completed", verdicts(run)
    assert runs.curve(run) == runs.curve(whole)
    assert runs.fingerprints(run) == runs.fingerprints(whole)


@pytest.mark.proof
@pytest.mark.parametrize(
    "words", [["--signal=USR1"], ["--signal=USR1", "--batch"]], ids=["to the ranks", "to the script"]
)
def test_a_signalled_training_goes_on_and_what_follows_waits_for_its_end(whole, start, words):
    run = start("jobs=[train,consolidate]")
    trained(run, 5)
    commands.call("scancel", *words, runs.job_id(run, "train"))
    runs.wait_until(lambda: (run / "jobs/train/attempt-1.json").exists())
    states = {job.name: job for job in runs.state.job_states(run)}
    assert (states["train"].state in commands.LIVE, states["train"].failed) == (True, False)
    assert states["consolidate"].state == "PENDING"
    ends_as(run, whole)
    assert verdicts(run) == [("preempted", True), ("completed", False)]
    train, merged = (attempts.last_verdict(run / "jobs" / name) for name in ("train", "consolidate"))
    assert merged["status"] == "completed"
    assert merged["started"] >= train["ended"]


def with_hook(tmp_path: Path, code: str) -> str:
    """An override by which every Python of the job runs `code` first."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(code)
    return f"cluster.environment={{PYTHONPATH: {tmp_path}/hook}}"


SLOW = """
import sys, time
real = time.perf_counter
def slow():
    if sys._getframe(1).f_globals.get("__name__") == "jobs.train":
        time.sleep(0.3)
    return real()
time.perf_counter = slow
"""
"""Each step, which looks at the clock twice, takes 0.6 s longer."""


@pytest.mark.proof
def test_a_training_at_its_time_limit_goes_on(whole, start, tmp_path):
    run = start("cluster.train.time_min=1", "cluster.signal_s=25", with_hook(tmp_path, SLOW))
    ends_as(run, whole)
    found = verdicts(run)
    assert len(found) > 1
    assert {status for status, _ in found[:-1]} == {"time_limit"}


@pytest.mark.proof
def test_a_training_whose_rank_is_killed_goes_on_from_its_checkpoint(whole, start):
    run = start("train.save_every=5")
    trained(run, 13)
    runs.kill_a_rank(run)
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["requeued"]) == ("failed", True)
    assert "(Killed)" in first["reason"]
    assert first["host"] in ("n1", "n2")
    assert first["saved"] >= 10


def test_a_training_of_which_a_rank_hangs_goes_on_from_its_checkpoint(whole, start):
    run = start("train.save_every=5", "cluster.network.step_timeout_s=10", "cluster.network.save_timeout_s=10")
    trained(run, 8)
    runs.stop_rank(run, 1)
    ends_as(run, whole)
    assert verdicts(run) == [("hang", True), ("completed", False)]
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["rank"], first["host"]) == (1, "n2")
    assert "process stopped (T); rank 0 waits in " in first["reason"]


@pytest.mark.proof
def test_a_training_that_fails_again_and_again_ends(start):
    run = start("cluster.max_restarts=1", "jobs=[train,consolidate]")
    for number in (1, 2):
        log, verdict = (run / f"jobs/train/attempt-{number}{rest}" for rest in ("/rank-0.log", ".json"))
        runs.wait_until(lambda log=log: log.exists() and "step" in log.read_text())
        runs.kill_a_rank(run)
        runs.wait_until(verdict.exists)
    jobs = runs.finish(run)
    assert verdicts(run) == [("failed", True), ("failed", False)]
    assert "cluster.max_restarts=1" in jobs["train"].verdict["next"]
    assert jobs["consolidate"].state == "CANCELLED"
    shown = runs.command("why", run).stdout
    assert "cluster.max_restarts=1" in shown
    assert "attempt 1 failed" in shown


def test_a_users_error_is_not_repeated(start):
    run = start("model.source=examples/tokenizer", "model.init=pretrained")
    jobs = runs.finish(run)
    assert verdicts(run) == [("user_error", False)]
    assert "mend it" in jobs["train"].verdict["next"]


@pytest.mark.proof
@pytest.mark.parametrize("how", ["stop", "cancel"])
def test_a_training_that_the_user_stops_is_saved_and_stays_ended(start, how):
    run = start("train.steps=4000")
    trained(run, 3)
    assert runs.command(how, run).returncode == 0
    jobs = runs.finish(run)
    assert verdicts(run) == [("stopped", False)]
    verdict = jobs["train"].verdict
    assert verdict["saved"] == verdict["step"] >= 3
    shown = runs.command("status", run)
    assert shown.returncode == 1
    assert "stopped" in shown.stdout
    assert "asked for" in shown.stdout


@pytest.mark.proof
def test_a_stopped_training_is_resumed_by_hand(whole, start):
    run = start()
    trained(run, 3)
    runs.command("stop", run)
    runs.finish(run)
    assert runs.command("resume", run).returncode == 0
    ends_as(run, whole)


def test_a_preempted_training_goes_on_when_there_is_room_again(whole, start):
    run = start("cluster.train.partition=gpu", "cluster.train.exclusive=true")
    trained(run, 5)
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
"""What Python runs first, so that every rank on n2 fails as on a broken GPU."""


@pytest.mark.proof
def test_a_training_leaves_a_bad_node(whole, start, tmp_path):
    run = start(with_hook(tmp_path, BROKEN), "cluster.train.sbatch={exclude: n4}")
    runs.wait_until(lambda: any("without n2" in item.get("next", "") for item in attempts.verdicts(run / "jobs/train")))
    job = commands.job(runs.job_id(run, "train"))
    assert sorted(commands.hostnames(job["ExcNodeList"])) == ["n2", "n4"]
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["host"], first["requeued"]) == ("bad_node", "n2", True)
    assert "without n2" in first["next"]


@pytest.mark.proof
def test_a_job_that_may_not_be_requeued_says_so(start):
    run = start("cluster.requeue=false")
    trained(run, 3)
    commands.call("scancel", "--signal=USR1", runs.job_id(run, "train"))
    assert "cluster.requeue=false" in runs.final_verdict(run, "train")["next"]
    assert verdicts(run) == [("preempted", False)]


@pytest.mark.proof
def test_a_training_whose_batch_script_is_killed_goes_on(whole, start, slurm):
    run = start("jobs=[train,consolidate]")
    trained(run, 5)
    faults.kill_script(faults.Scene(run, slurm, Random(0)))
    ends_as(run, whole)
    first = attempts.verdicts(run / "jobs/train")[0]
    assert (first["status"], first["requeued"]) == ("preempted", True)
    assert "its batch script was killed" in first["reason"]
    assert attempts.last_verdict(run / "jobs/consolidate")["status"] == "completed"


@pytest.mark.proof
def test_a_training_whose_node_is_lost_goes_on_elsewhere(whole, start, slurm):
    run = start("train.save_every=5")
    trained(run, 8)
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
def test_what_slurm_ends_without_a_word_has_a_verdict_too(whole, start):
    run = start("train.save_every=5")
    trained(run, 7)
    commands.call("scontrol", "requeue", runs.job_id(run, "train"))
    ends_as(run, whole)
    assert verdicts(run)[0] == ("preempted", True)


@pytest.mark.proof
def test_requeue_needs_nothing_but_python(whole, start):
    """`sbatch` by hand of the script that was written gives the same job."""
    run = start("submit=script")
    done = subprocess.run(
        ["sbatch", "--parsable", run / "jobs/train.sbatch"], capture_output=True, text=True, check=True
    )
    trained(run, 5)
    commands.call("scancel", "--signal=USR2", done.stdout.strip())
    ends_as(run, whole)
    assert verdicts(run) == [("preempted", True), ("completed", False)]
