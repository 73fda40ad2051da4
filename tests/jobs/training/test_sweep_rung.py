"""Trainings of a sweep that end early because their loss is among the worst."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from conf import sweep
from conf.files import read_json, write_json
from jobs.training.sweep_rung import PlannedRung, recorded_step
from launcher.run_folder import attempts, sweep_record
from tests.conftest import Compose, put
from tests.jobs import ranks


def other_runs(folder: Path, losses: Sequence[float]) -> None:
    """A sweep of `run` and others, which have come to the step of the comparison with these losses; one has not started."""
    names = [f"other-{number}" for number, _ in enumerate(losses)]
    write_json(folder / sweep.FILE, {"runs": dict.fromkeys([*names, "run", "waits"], {}), "jobs": {}})
    for name, loss in zip(names, losses, strict=True):
        write_json(folder / name / sweep.RUNG, {"step": 7, "loss": loss, "goes_on": True})


END = "ended early at step {} of 40 by sweep.stop_worst=0.5@25%: at step 10, with a held-out loss of 2.0000, "


@pytest.mark.parametrize(
    ("losses", "better"), [([], 0), ([3.0], 0), ([1.0], 1), ([1.0, 3.0], 0), ([1.0, 1.5, 3.0], 2), ([2.0, 2.0], 0)]
)
def test_a_run_ends_if_it_is_in_the_worse_half_of_those_so_far(
    compose: Compose, tmp_path: Path, losses: list[float], better: int
) -> None:
    other_runs(tmp_path, losses)
    config = put(compose(), {"run_dir": str(tmp_path / "run"), "sweep.stop_worst": "0.5@25%"})
    rung = PlannedRung(config, 40)
    assert [step for step in range(41) if rung.is_due(step)] == [10]
    assert rung.compare(10, 2.0) is bool(better)
    recorded = {"step": 10, "loss": 2.0, "kind": "held-out", "goes_on": True}
    assert read_json(tmp_path / "run" / sweep.RUNG) == recorded
    assert recorded_step(tmp_path / "run") == 10
    if better:
        why = rung.record_end(10)
        assert why == END.format(10) + f"{better} of {len(losses)} other runs of the sweep were better"
        assert read_json(tmp_path / "run" / sweep.RUNG) == recorded | {"goes_on": False, "ended": 10, "reason": why}


def test_a_run_that_came_first_is_overtaken_later_also_after_a_restart(compose: Compose, tmp_path: Path) -> None:
    config = put(compose(), {"run_dir": str(tmp_path / "run"), "sweep.stop_worst": "0.5@25%"})
    other_runs(tmp_path, [])
    assert not PlannedRung(config, 40).review(11), "it has not been compared"
    rung = PlannedRung(config, 40)
    assert not rung.compare(10, 2.0)
    other_runs(tmp_path, [1.0, 1.5, 3.0])
    again = PlannedRung(config, 40, recorded_step=10)
    assert not again.review(10), "a resumed run has to come to the step of the comparison first"
    for continued in (rung, again):
        assert [continued.review(step) for step in (11, 12)] == [True, False], "the files are read only now and then"
    assert again.record_end(12) == END.format(12) + "2 of 3 other runs of the sweep were better"


def test_without_held_out_rows_the_median_of_the_last_losses_counts(compose: Compose, tmp_path: Path) -> None:
    other_runs(tmp_path, [1.9])
    config = put(compose(), {"run_dir": str(tmp_path / "run"), "sweep.stop_worst": "0.5@25%"})
    rung = PlannedRung(config, 40, [9.0, 2.0])
    rung.add_loss(1.0)
    assert rung.compare(10, None)
    assert "with a training loss of 2.0000, 1 of 1" in rung.record_end(10)


def test_a_training_too_short_for_a_comparison_has_none(compose: Compose) -> None:
    assert PlannedRung(put(compose(), {"sweep.stop_worst": "0.5@99%"}), 5).step is None
    assert PlannedRung(compose(), 5).step is None


@pytest.mark.slow
def test_on_this_machine_one_of_the_worst_ends_early_and_the_best_is_merged(tmp_path: Path) -> None:
    sweep_folder = tmp_path / "sweep"
    words = [
        "cluster.train.ranks_per_node=2", "train.global_batch=8", "train.steps=8", "data.max_rows=60", "train.eval_every=0",
        "jobs=[preprocess,train,consolidate]", "cluster.train.gpus_per_node=0", "train.save_every=0", "consolidate.verify=weights",
    ]  # fmt: skip
    swept = ["-m", "train.learning_rate=1e-2,1e-5", "sweep.stop_worst=0.5@25%", f"run_dir={sweep_folder}"]
    shown = ranks.run(*swept, *words)
    assert re.search(
        r"ended early at step 2 of 8 by sweep.stop_worst=0.5@25%: at step 2, with a held-out loss of [\d.]+, 1 of 1 other runs",
        shown,
    )
    best, worst = (sweep_folder / f"train.learning_rate={rate}" for rate in ("1e-2", "1e-5"))
    steps = [max(line["step"] for line in attempts.metrics(run)) for run in (best, worst)]
    assert steps == [8, 2]
    assert (worst / "checkpoints/step-00000002").is_dir()
    assert [sweep_record.ended_early(run) for run in (best, worst)] == [False, True]
    assert [(run / "model").exists() for run in (best, worst)] == [True, False]
    assert len(list(tmp_path.glob(".data/*/set.json"))) == 1  # tokenized once
    assert [attempts.newest_attempt(run / "jobs/preprocess") for run in (best, worst)] == [1, None]
    again = ranks.run(f"resume={sweep_folder}")
    assert "nothing to do" in again
