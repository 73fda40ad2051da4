"""`muster status`: several runs, job ids, times, progress, jobs to come, scripts submitted by hand, and --watch."""

import json
import time
from pathlib import Path

import pytest

from conf.files import write_json
from launcher import __main__ as muster
from launcher.status import overview
from launcher.supervise import attempt
from tests.conftest import Programs
from tests.launcher.status.test_listing import launched
from tests.launcher.status.test_state import ended

CONFIG = "run_dir: x\njobs:\n- preprocess\n- train\n- consolidate\nmodel:\n  name: tiny\ntrain:\n  steps: null\n"
SQUEUE = """case "$*" in
*%L*) echo "102|1-00:30:00";;
*--jobs*) echo "Dependency|N/A";;
*) echo "102|RUNNING";;
esac"""


@pytest.fixture
def run(tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on Slurm whose training runs for a minute; consolidate has not been started."""
    programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'")
    run = launched(tmp_path / "runs/a", 1, preprocess="101", train="102")
    (run / "config.yaml").write_text(CONFIG)
    ended(run, "preprocess", "101", "completed")
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    attempt.begin(run / "jobs/train")
    write_json(run / "jobs/train/attempt-1/begin.json", {"job_id": "102", "started": time.time() - 60})
    now = time.time()
    lines = [
        {"step": 10, "loss": 2.5, "tokens_per_s": 900.0, "left_s": 600, "steps": 70, "time": now - 30},
        {"step": 11, "loss": 2.25, "tokens_per_s": 1000.0, "time": now - 1},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_training_has_times_and_progress(run: Path) -> None:
    (found,) = overview.read([run])
    preprocess, train, consolidate = found.records()
    assert preprocess["progress"] is None
    assert train["time_left_s"] == 24.5 * 3600
    assert 59 < train["elapsed_s"] < 70
    assert 560 < train["progress"].pop("left_s") <= 570, "left_s was written 30 s ago"
    assert train["progress"] == {"step": 11, "steps": 70, "loss": 2.25, "tokens_per_s": 1000.0}
    assert (consolidate["name"], consolidate["state"], consolidate["failed"]) == ("consolidate", "TO_COME", False)


def test_the_table_has_them_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster.main(["status", str(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["job", "id", "state", "attempt", "verdict", "elapsed", "left", "reason"]
    assert rows[2][:4] == ["train", "102", "running", "1"]
    assert rows[2][-3:] == ["1", "day,", "0:30:00"]
    assert rows[3] == ["consolidate", "to", "come"]
    assert rows[4][:7] == ["training", "step", "11/70", "loss", "2.2500", "1,000", "tokens/s"]


def test_a_training_that_has_ended_has_no_time_left(run: Path, programs: Programs) -> None:
    programs(squeue="exit 0", sacct="echo '101|COMPLETED'; echo '102|FAILED'")
    (found,) = overview.read([run])
    assert (found.progress.step, found.progress.left_s) == (11, None)
    assert not found.is_live


def test_several_runs_are_shown_with_one_question_to_slurm(
    run: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    other = launched(run.parent / "b", 2, train="102")
    folder = programs(squeue=SQUEUE)
    assert muster.main(["status", str(run), str(other), str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("/")] == [str(run), str(other)]
    assert len((folder / "squeue.calls").read_text().splitlines()) == 2, "states, and time left"
    assert muster.main(["status", str(run), str(other), "--json"]) == 0
    assert [job["run"] for job in json.loads(capsys.readouterr().out)] == [str(run)] * 3 + [str(other)]


@pytest.mark.parametrize("known", [True, False], ids=["Slurm knows its folder", "below runs"])
def test_a_run_is_found_by_the_id_of_a_job(
    run: Path,
    programs: Programs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    known: bool,
) -> None:
    monkeypatch.chdir(run if known else tmp_path)
    listed = f"102|RUNNING|me|tiny/train|{run}/code" if known else ""
    programs(squeue=f"echo '{listed}'", sacct="exit 0")
    assert muster.main(["status", "102", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["run"] == str(run)
    assert muster.main(["status", "999"]) == 2
    message = "RUN=999: is no folder, and the job is not known to Slurm; no run below runs/ has started it"
    assert message in capsys.readouterr().err


def test_an_id_names_no_run_to_commands_that_change_it(
    run: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    """`muster cancel 102` would end all jobs of the run."""
    folder = programs(squeue=f"echo '102|RUNNING|me|tiny/train|{run}/code'", scancel="exit 0")
    assert muster.main(["cancel", "102"]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (folder / "scancel.calls").exists()


def test_scripts_that_were_submitted_by_hand_are_shown(
    tmp_path: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launched(tmp_path / "runs/script", 1)
    (run / "config.yaml").write_text(CONFIG)
    for name in ("preprocess", "train"):
        (run / f"jobs/{name}").mkdir(parents=True)
        (run / f"jobs/{name}.sbatch").touch()
    programs(
        squeue=f"""case "$*" in
*%o*) echo "{run}/jobs/train.sbatch|7|PENDING|me|tiny/train|{run}/code"
      echo "/x/jobs/train.sbatch|8|PENDING|me|tiny/train|/x/code";;
*%r*) echo "Priority|N/A";;
esac"""
    )
    assert muster.main(["status", str(run)]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["train", "7", "pending"], ["preprocess", "to", "come"], ["consolidate", "to", "come"]]


def test_watch_prints_lines_until_the_run_ends(
    run: Path, programs: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    asked.write_text("0\n")
    programs(
        squeue=f"""case "$*" in *%L*) exit 0;; esac
read n < "{asked}"; echo $((n + 1)) > "{asked}"; if [ $n -lt 3 ]; then echo "102|RUNNING"; fi""",
        sacct="echo '101|COMPLETED'; echo '102|CANCELLED'",
    )
    (run / "metrics.jsonl").unlink()
    assert muster.main(["status", str(run), "--watch", "--every", "0.05"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[21:] for line in lines] == ["a  train running", "a  train stopped"]
    assert time.strptime(lines[0][:19], "%Y-%m-%d %H:%M:%S")


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ([], 2, "usage: "),
        (["help"], 0, "usage: "),
        (["staus", "RUN"], 2, "staus: no such command: did you mean python -m launcher status?"),
        (["generate", "RUN"], 2, "generate: no such command. python -m launcher help lists them"),
        (["train.steps=3"], 2, "to launch a run: python -m launcher run train.steps=3"),
    ],
)
def test_a_word_that_is_no_command(words: list[str], code: int, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster.main(words) == code
    assert shown in "".join(capsys.readouterr())
