"""launcher/submit/rewind.py: going back to a chosen checkpoint keeps what came after it, and happens once."""

import json
from pathlib import Path

import pytest

from conf.schema import Config
from launcher.check import input_rules
from launcher.check.inputs import Inputs, RunFolder
from launcher.submit import rewind
from tests.conftest import Compose, put

METRICS = [{"step": 5, "loss": 2.0}, {"step": 20, "loss": 1.0}]


@pytest.fixture
def run(compose: Compose, tmp_path: Path) -> Config:
    """A run with checkpoints of the steps 5, 10 and 20, resumed at 5 with another learning rate."""
    for step in (5, 10, 20):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints/latest").write_text("step-00000020\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (tmp_path / "tracker.json").write_text('{"wandb": "abc"}')
    values = {"run_dir": str(tmp_path), "resume": str(tmp_path), "train.resume_step": 5, "train.learning_rate": 1e-4}
    return put(compose("train.learning_rate=1e-3"), values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_came_after_is_kept_aside_once(run: Config, tmp_path: Path) -> None:
    rewind.apply(run)
    assert run.train.resume_step is None  # the next attempt goes on from its own checkpoints
    rewind.apply(run)
    assert names(tmp_path / "checkpoints") == ["latest", "replaced-1", "step-00000005"]
    assert names(tmp_path / "checkpoints/replaced-1") == [
        "metrics.jsonl", "step-00000010", "step-00000020", "tracker.json",
    ]  # fmt: skip
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000005\n"
    assert (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "tracker.json").exists()


def test_a_second_return_has_a_folder_of_its_own(run: Config, tmp_path: Path) -> None:
    rewind.apply(put(run, {"train.resume_step": 10}))
    rewind.apply(put(run, {"train.resume_step": 5}))
    assert "step-00000010" in names(tmp_path / "checkpoints/replaced-2")


def test_a_line_for_each_change(run: Config, compose: Compose, tmp_path: Path) -> None:
    stored = compose("train.learning_rate=1e-3")
    assert list(rewind.notes(stored, run)) == [
        f"resume    from the checkpoint of step 5; the newer ones (10, 20) and metrics.jsonl are kept in "
        f"{tmp_path}/checkpoints/replaced-1",
        "changed   train.learning_rate from 0.001 to 0.0001: after step 5 the schedule is that of 0.0001",
    ]
    assert list(rewind.notes(stored, put(run, {"train.resume_step": None})))[0].endswith(
        "after step 20 the schedule is that of 0.0001"
    )
    assert not list(rewind.notes(stored, put(run, {"train.resume_step": None, "train.learning_rate": 1e-3})))


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ({}, (5, 10), None),
        ({"train.resume_step": 7}, (5, 10), "there is no checkpoint of this step in run_dir={run}. Use one of 5, 10"),
        ({}, (), "there is no checkpoint of this step in run_dir={run}. The run has none yet"),
        ({"resume": None}, (5,), "is for a run that has checkpoints. Name it: muster resume RUN train.resume_step=5"),
        ({"jobs": ["consolidate"]}, (5,), "has no effect without the job train. To merge this checkpoint: "),
        ({"custom.command": "python x.py", "jobs": ["custom"]}, (5,), "a program of your own chooses its checkpoint"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Config, values: dict[str, object], steps: tuple[int, ...], message: str | None
) -> None:
    inputs = Inputs(run=RunFolder(steps, has_data=True))
    found = [str(item) for item in input_rules.problems(put(run, values), inputs, iter(()))]
    if message is None:
        assert found == []
    else:
        key = f"train.resume_step={run.train.resume_step}: "
        assert any(item.startswith(key + message.format(run=run.run_dir)) for item in found), found
