"""`muster cancel --job` and `muster save`: what a run is asked for."""

from pathlib import Path

import pytest

from launcher import __main__ as muster
from tests.conftest import Programs
from tests.launcher.status.test_state import SQUEUE, launched


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    launched(run, "slurm", preprocess="101", train="102", consolidate="103")
    return run


def test_one_job_is_cancelled(run: Path, programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'", scancel="exit 0")
    assert muster.main(["cancel", str(run), "--job", "train"]) == 0
    assert (folder / "scancel.calls").read_text() == "102\n"
    assert capsys.readouterr().out == "cancelled 1 job\n"


def test_a_job_that_has_ended_is_not_cancelled(
    run: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'", scancel="exit 0")
    assert muster.main(["cancel", str(run), "--job", "preprocess"]) == 2
    assert "JOB=preprocess: is not pending or running; these are: train, consolidate" in capsys.readouterr().err
    assert not (folder / "scancel.calls").exists()


def test_save_writes_a_file_for_training(run: Path, programs: Programs, capsys: pytest.CaptureFixture[str]) -> None:
    programs(squeue=SQUEUE)
    assert muster.main(["save", str(run)]) == 0
    assert (run / "jobs/train/save").exists()
    assert not (run / "jobs/train/stop").exists()
    assert f"appears in {run}/checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("job", "message"), [("train", "training is not running (pending)"), ("custom", "your own program decides")]
)
def test_what_cannot_save_is_refused(
    tmp_path: Path, programs: Programs, capsys: pytest.CaptureFixture[str], job: str, message: str
) -> None:
    programs(squeue="echo '7|PENDING'")
    launched(tmp_path, "slurm", **{job: "7"})
    (tmp_path / "jobs" / job).mkdir(parents=True)
    assert muster.main(["save", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jobs" / job / "save").exists()
