"""A sweep on a real Slurm: one array, a throttle, a failing run, the best one merged; and a task of it that is requeued."""

import json
import time
from pathlib import Path

import pytest

from launcher import slurm as commands
from launcher.run_folder import attempts
from launcher.status import sweep as sweep_status
from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
RATES = ["1e-4", "3e-4", "1e-3", "2e-3", "3e-3", "5e-3", "1e-2", "100"]
SMALL = [
    "-m", "cluster.train.nodes=1", "cluster.train.ranks_per_node=1", "cluster.max_restarts=0", "train.global_batch=8",
    "train.warmup_steps=0", "train.precision=fp32", "train.eval_every=0", "data.max_rows=60", "consolidate.verify=weights",
]  # fmt: skip


def in_queue(array: str) -> dict[str, str]:
    """The states of the tasks of an array, by their ids."""
    lines = commands.call("squeue", "--noheader", "--array", "--states=all", "--format", "%i|%T").splitlines()
    return dict(line.split("|") for line in lines if line.startswith(f"{array}_"))


def test_eight_runs_are_one_array_of_which_one_fails_and_the_best_is_merged(slurm: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    rates = f"train.learning_rate={','.join(RATES)}"
    jobs = "jobs=[preprocess,train,consolidate]"
    done = runs.launch(*SMALL, f"run_dir={sweep}", rates, "train.steps=4", "sweep.at_once=2", jobs)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [sweep / f"train.learning_rate={rate}" for rate in RATES]
    ids = [runs.job_id(run, "train") for run in folders]
    [array] = {job_id.partition("_")[0] for job_id in ids}
    assert ids == [f"{array}_{number}" for number in range(8)]

    at_once = []
    while sweep_status.look(sweep).is_live:
        at_once.append(sum(state == "RUNNING" for state in in_queue(array).values()))
    assert max(at_once) == 2

    verdicts = {run.name.partition("=")[2]: attempts.last_verdict(run / "jobs/train") for run in folders}
    ended = {rate: verdict["status"] if verdict else "" for rate, verdict in verdicts.items()}
    assert ended == {rate: "completed" for rate in RATES[:-1]} | {"100": "failed"}
    assert [run for run in folders if attempts.newest_attempt(run / "jobs/preprocess")] == folders[:1]
    losses = {run: runs.metrics(run)[-1]["eval_loss"] for run in folders[:-1]}
    best = min(losses, key=lambda run: losses[run])
    assert [run for run in folders if (run / "model").exists()] == [best]
    assert [run for run in folders if attempts.newest_attempt(run / "jobs/consolidate")] == [best]

    shown = runs.command("status", sweep)
    assert shown.returncode == 1
    assert f"best {best.name}" in shown.stdout
    assert "failed train" in shown.stdout
    states = json.loads(runs.command("status", best, "--json").stdout)
    assert {job["name"]: job["state"] for job in states} == {"train": "COMPLETED", "consolidate": "COMPLETED"}


@pytest.mark.proof
def test_a_task_of_an_array_is_requeued_stopped_continued_and_cancelled_by_its_run(
    slurm: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    long = ["train.steps=400", "train.save_every=5", "train.learning_rate=1e-3", "jobs=[preprocess,train]"]
    done = runs.launch(*SMALL, f"run_dir={sweep}", "train.seed=0,1,2", *long)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third = (sweep / f"train.seed={seed}" for seed in range(3))
    runs.wait_until(lambda: all(runs.step(run) >= 6 for run in (first, second, third)))
    commands.call("scontrol", "requeue", runs.job_id(first, "train"))
    assert runs.command("stop", second).returncode == 0
    assert runs.command("cancel", third).stdout == "cancelled 1 job\n"
    runs.wait_until(lambda: len(attempts.verdicts(first / "jobs/train")) >= 1 and runs.step(first) >= 12)
    assert runs.final_verdict(second, "train")["status"] == "stopped"
    assert runs.final_verdict(third, "train")["status"] == "stopped"
    states = runs.job_states(first)
    assert (states["train"].state, states["train"].attempt) == ("RUNNING", 2)
    assert [item["status"] for item in states["train"].before] == ["preempted"]

    again = runs.command("resume", sweep, "train.steps=12")  # it says that one of the runs still trains
    assert again.returncode == 2
    assert "is already running: train" in again.stderr
    assert runs.command("cancel", sweep).stdout == "cancelled 1 job\n"
    runs.finish(first)
    again = runs.command("resume", sweep, "train.steps=12")
    assert again.returncode == 0, again.stdout + again.stderr
    for run in (first, second, third):
        assert runs.final_verdict(run, "train")["status"] == "completed"
        assert max(line["step"] for line in runs.metrics(run)) >= 12


@pytest.mark.proof
def test_the_worst_runs_end_early_whoever_comes_first_fails_or_is_requeued(slurm: Cluster, tmp_path: Path) -> None:
    """The worst two come first, so they are overtaken later. One run fails before the comparison, the best one is requeued."""
    sweep, rates = tmp_path / "sweep", ["1e-5", "1e-4", "3e-3", "1e-2", "100"]
    long = ["train.steps=60", "train.save_every=5", "jobs=[preprocess,train,consolidate]"]
    rung = [f"train.learning_rate={','.join(rates)}", "sweep.stop_worst=0.5@30%"]
    done = runs.launch(*SMALL, f"run_dir={sweep}", *rung, *long)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = {rate: sweep / f"train.learning_rate={rate}" for rate in rates}
    runs.wait_until(lambda: runs.step(folders["3e-3"]) >= 6)
    commands.call("scontrol", "requeue", runs.job_id(folders["3e-3"], "train"))
    while sweep_status.look(sweep).is_live:
        time.sleep(1)

    ended = {rate: attempts.last_verdict(run / "jobs/train") or {} for rate, run in folders.items()}
    assert {rate: verdict["status"] for rate, verdict in ended.items()} == dict.fromkeys(rates[:4], "completed") | {
        "100": "failed"
    }
    early = {rate for rate, verdict in ended.items() if verdict.get("ended_early")}
    assert early == {"1e-5", "1e-4"}
    for rate in early:
        assert "by sweep.stop_worst=0.5@30%: at step 18, with a held-out loss of" in ended[rate]["reason"]
        assert 18 <= runs.step(folders[rate]) < 60
    requeued, completed = attempts.verdicts(folders["3e-3"] / "jobs/train")  # it saved first, or had no time to
    assert (requeued["requeued"], completed["status"]) == (True, "completed")
    assert [run for run in folders.values() if (run / "model").exists()] == [folders["3e-3"]]
    assert runs.command("status", sweep).stdout.count("ended early") == 2
    assert runs.command("compare", sweep, "--out", tmp_path / "compare.html").stdout.count("ended early") == 2
    assert (tmp_path / "compare.html").read_text().count("ended early") == 2
    alone = tmp_path / "alone"
    runs.complete(alone, *SMALL[1:], "train.learning_rate=3e-3", "train.steps=60", "jobs=[preprocess,train]")

    def losses(run: Path) -> list[float]:
        return [line["loss"] for line in runs.metrics(run) if "loss" in line]

    assert losses(folders["3e-3"]) == losses(alone)
    again = runs.command("resume", folders["1e-5"], "sweep.stop_worst=null")
    assert again.returncode == 0, again.stderr
    assert not runs.final_verdict(folders["1e-5"], "train").get("ended_early")
    assert runs.step(folders["1e-5"]) == 60
