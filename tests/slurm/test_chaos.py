"""One training that meets a short fault of many kinds, and what the chaos suite draws and writes. `make chaos` strikes more."""

import time
from random import Random

import pytest

from launcher.run_folder import attempts
from tests.slurm import chaos_page, faults, kinds, runs
from tests.slurm.test_requeue import ends_as, trained, verdicts


@pytest.mark.slurm
@pytest.mark.slow
def test_a_training_that_meets_one_fault_after_another(whole, start, slurm, tmp_path):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(faults.HOOK)
    kind = kinds.Kind("all of them", faults.slow, step_s=0.2)
    run = start("train.save_every=5", "train.log_every=1", kinds.environment(kind, tmp_path / "hook"))
    scene = faults.Scene(run, slurm, Random(0))
    trained(run, 2)
    slurm.stop_controller()
    slurm.kill_slurmd("n1")
    slurm.unplug("n2")
    time.sleep(2)
    slurm.plug("n2")
    slurm.start_slurmd("n1")
    slurm.start_controller()
    faults.slow(scene)
    trained(run, 11)
    assert verdicts(run) == []  # none of that ends an attempt

    runs.wait_until(lambda: len(scene.checkpoints) >= 2)
    faults.no_latest(scene)  # and the killed rank that it begins with
    damaged = faults.flip(scene, scene.checkpoints[-1]).split("/")[0]
    log = scene.folder / "attempt-2/rank-0.log"
    runs.wait_until(lambda: log.exists() and "\nstep " in log.read_text())
    assert f"checkpoint {damaged} is damaged and skipped" in log.read_text()
    faults.kill_script(scene)
    ends_as(run, whole)
    assert verdicts(run) == [("failed", True), ("preempted", True), ("completed", False)]
    assert "(Killed)" in attempts.verdicts(scene.folder)[0]["reason"]
    assert "its batch script was killed" in attempts.verdicts(scene.folder)[1]["reason"]
    assert 5 < faults.lost(run, 40) <= 15


def test_a_suite_is_drawn_from_its_seed():
    names = list(kinds.KINDS)
    plans = kinds.draw(60, 0, names)
    assert plans == kinds.draw(60, 0, names) != kinds.draw(60, 1, names)
    assert 60 <= sum(len(plan.steps) for plan in plans) <= 61
    first = [plan.kind for plan in plans[: len(names)]]
    assert first != names
    assert sorted(first) == sorted(names)


FOUND = {
    "number": 2, "kind": "hang", "layout": "zero3", "seed": 7, "cores": 2, "faults": 2, "lost": 6, "recovery_s": [30.2, 41.0],
    "outcome": "recovered", "why": "",
}  # fmt: skip


def test_the_page_says_what_was_found(tmp_path):
    wrong = {"number": 1, "faults": 1, "outcome": "wrong", "why": "it ended as failed: why"}
    chaos_page.write(tmp_path / "page.md", [FOUND, FOUND | wrong])
    page = (tmp_path / "page.md").read_text()
    assert "3 faults in 2 runs (seed 7), on 2 nodes: 2 recovered, 0 stopped rightly, 1 wrong." in page
    assert "| SIGSTOP of a rank | 3 | 2 | 0 | 1 | 6 / 6 / 6 | 30 / 36 / 41 |\n" in page
    assert "- run 1 (seed 7), hang under zero3: it ended as failed: why\n" in page
