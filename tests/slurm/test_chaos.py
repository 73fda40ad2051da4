"""One training with many short faults; and what the chaos suite draws and writes. `make chaos` injects more faults."""

import time
from pathlib import Path
from random import Random

import pytest

from launcher.run_folder import attempts
from tests.slurm import chaos_page, faults, kinds, runs
from tests.slurm.cluster import Cluster
from tests.slurm.test_requeue import ends_as, verdicts, wait_for_step


@pytest.mark.slurm
@pytest.mark.slow
def test_a_training_that_meets_one_fault_after_another(
    whole: Path, start: runs.Start, slurm: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(faults.HOOK)
    kind = kinds.Kind("all of them", faults.slow, step_s=0.2)
    run = start("train.save_every=5", "train.log_every=1", kinds.environment(kind, tmp_path / "hook"))
    scene = faults.Scene(run, slurm, Random(0))
    wait_for_step(run, 2)
    slurm.stop_controller()
    slurm.kill_slurmd("n1")
    slurm.unplug("n2")
    time.sleep(2)
    slurm.plug("n2")
    slurm.start_slurmd("n1")
    slurm.start_controller()
    faults.slow(scene)
    wait_for_step(run, 11)
    assert verdicts(run) == []  # none of these faults ends an attempt

    runs.wait_until(lambda: len(scene.checkpoints) >= 2)
    faults.no_latest(scene)  # this also kills a rank
    damaged = faults.flip(scene, scene.checkpoints[-1]).split("/")[0]
    log = scene.folder / "attempt-2/rank-0.log"
    runs.wait_until(lambda: log.exists() and " INFO step " in log.read_text())
    assert f"checkpoint {damaged} is damaged and skipped" in log.read_text()
    faults.kill_script(scene)
    ends_as(run, whole)
    assert verdicts(run) == [("failed", True), ("preempted", True), ("completed", False)]
    assert "(Killed)" in attempts.verdicts(scene.folder)[0]["reason"]
    assert "its batch script was killed" in attempts.verdicts(scene.folder)[1]["reason"]
    assert 5 < faults.lost_steps(run, 40) <= 15


def test_runs_are_drawn_from_the_seed() -> None:
    names = list(kinds.KINDS)
    planned = kinds.draw(60, 0, names)
    assert planned == kinds.draw(60, 0, names) != kinds.draw(60, 1, names)
    assert 60 <= sum(len(run.steps) for run in planned) <= 61
    first = [run.kind for run in planned[: len(names)]]
    assert first != names
    assert sorted(first) == sorted(names)


RESULT = {
    "number": 2, "kind": "hang", "layout": "zero3", "seed": 7, "cores": 2, "faults": 2, "lost": 6, "recovery_s": [30.2, 41.0],
    "outcome": "recovered", "why": "",
}  # fmt: skip


def test_the_page_shows_the_results(tmp_path: Path) -> None:
    wrong = {"number": 1, "faults": 1, "outcome": "wrong", "why": "it ended as failed: why"}
    chaos_page.write(tmp_path / "page.md", [RESULT, RESULT | wrong])
    page = (tmp_path / "page.md").read_text()
    assert "3 faults in 2 runs (seed 7), on 2 nodes: 2 recovered, 0 stopped correctly, 1 wrong." in page
    assert "| SIGSTOP of a rank | 3 | 2 | 0 | 1 | 6 / 6 / 6 | 30 / 36 / 41 |\n" in page
    assert "- run 1 (seed 7), hang under zero3: it ended as failed: why\n" in page
