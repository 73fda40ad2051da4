"""launcher/run_folder/sweep_record.py: which run of a sweep is the best, and records that cannot be trusted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conf import sweep
from conf.errors import RunError
from conf.files import write_json
from launcher.run_folder import sweep_record
from tests.conftest import ROOT


def trained(folder: Path, name: str, lines: list[dict[str, float]], status: str = "completed") -> Path:
    run = folder / name
    write_json(run / "jobs/train/attempt-1/begin.json", {})
    write_json(run / "jobs/train/attempt-1.json", {"status": status})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep: `a` is the best of those that ended well; the others have lower losses."""
    trained(tmp_path, "b", [{"step": 0, "eval_loss": 0.1}, {"step": 4, "loss": 1.0, "eval_loss": 3.0}])
    trained(tmp_path, "a", [{"step": 2, "eval_loss": 2.5}, {"step": 4, "loss": 2.0, "eval_loss": 2.0}])
    trained(tmp_path, "failed", [{"step": 4, "loss": 0.5, "eval_loss": 0.5}], "failed")
    early = trained(tmp_path, "early", [{"step": 1, "loss": 0.4, "eval_loss": 0.4}])
    write_json(early / "jobs/train/attempt-1.json", {"status": "completed", "ended_early": True})
    names = ["b", "a", "failed", "early", "waits"]
    sweep_record.write(tmp_path, dict.fromkeys(names, {}), [], merges_best_step=False)
    return tmp_path


def test_the_best_is_the_lowest_held_out_loss_of_those_that_were_trained_to_the_end(folder: Path) -> None:
    assert [run.name for run in sweep_record.runs(folder)] == ["b", "a", "failed", "early", "waits"]
    assert sweep_record.best(folder) == folder / "a"


def test_the_loss_is_that_of_the_checkpoint_that_is_merged(folder: Path) -> None:
    trained(folder, "b", [{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 3.0}])
    assert sweep_record.best(folder) == folder / "a"
    sweep_record.write(folder, {"a": {}, "b": {}}, [], merges_best_step=True)
    assert sweep_record.best(folder) == folder / "b"


def test_training_losses_are_compared_if_a_run_has_no_held_out_loss(folder: Path) -> None:
    trained(folder, "a", [{"step": 4, "loss": 2.0}])
    assert sweep_record.best(folder) == folder / "b"


def test_a_run_that_was_continued_after_its_early_end_counts(folder: Path) -> None:
    with (folder / "early/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.3, "eval_loss": 0.3}\n')
    write_json(folder / "early/jobs/train/attempt-2/begin.json", {})
    write_json(folder / "early/jobs/train/attempt-2.json", {"status": "completed"})
    assert sweep_record.best(folder) == folder / "early"


def test_a_node_without_muster_s_packages_can_ask(folder: Path) -> None:
    words = [sys.executable, "-S", "-m", "launcher.supervise.best_run", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder}/a\n", "")
    sweep_record.write(folder, {"failed": {}}, [], merges_best_step=False)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"muster: no training of {folder} has completed, so there is no best one\n"


@pytest.mark.parametrize(
    "content",
    ["{", {"runs": {"../x": {}}, "jobs": {}}, {"runs": {"..": {}}, "jobs": {}}, {"runs": {"a": {}}, "jobs": {"x": "-u"}}],
)  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / sweep.FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RunError, match="damaged, or that Muster did not write"):
        sweep_record.runs(tmp_path)
