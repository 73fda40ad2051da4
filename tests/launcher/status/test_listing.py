"""`muster ls`, `muster wait` and `muster status --json`: on run folders made by hand."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from conf.files import write_json
from launcher import __main__ as muster
from launcher.run_folder import lock, record
from launcher.status import listing
from tests.conftest import Programs
from tests.launcher.status.test_state import ended

SQUEUE = "; ".join([*(f'echo "{number}|RUNNING"' for number in range(200, 220)), 'echo "301|PENDING"'])
DONE = 'for id in 101 102; do echo "$id|COMPLETED"; done; echo "401|FAILED"'


def launched(run: Path, minute: int, **jobs: str) -> Path:
    launch = {"command": [], "time": f"2026-11-30T10:{minute:02}:00+0000", "cluster": "slurm", "jobs": jobs}
    run.mkdir(parents=True)
    write_json(run / "run.json", {"launches": [launch]})
    return run


@pytest.fixture
def runs(tmp_path: Path, programs: Programs) -> Path:
    """A run that has completed, one that trains, one that waits, one that failed, and one with a damaged record."""
    programs(squeue=SQUEUE, sacct=DONE)
    folder = tmp_path / "runs"
    done = launched(folder / "done", 1, preprocess="101", train="102")
    ended(done, "preprocess", "101", "completed")
    ended(done, "train", "102", "completed")
    trains = launched(folder / "sweep/lr=1e-3", 3, train="201")
    (trains / "config.yaml").write_text(
        "run_dir: x\ntrain:\n  # how long\n  epochs: null\n  steps: 40\n  eval_every: 2\n"
    )
    steps = [{"step": 1, "loss": 3.5}, {"step": 7, "loss": 2.25, "left_s": 900}, {"step": 7, "eval_loss": 2.0}]
    (trains / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + '\n{"step": 8, "lo')
    launched(folder / "sweep/lr=1e-2", 2, train="301")
    failed = launched(folder / "failed", 4, train="401")
    ended(failed, "train", "401", "user_error", "no such file")
    (folder / "damaged").mkdir()
    (folder / "damaged/run.json").write_text("{")
    (folder / "no run").mkdir()
    return folder


def test_every_run_below_a_folder_is_listed(runs: Path, programs: Programs) -> None:
    found = {str(item.run.relative_to(runs)): item for item in listing.summaries(runs)}
    assert list(found) == ["damaged", "done", "sweep/lr=1e-2", "sweep/lr=1e-3", "failed"]
    assert found["done"].state == "completed"
    assert found["sweep/lr=1e-2"].state == "pending train"
    assert found["failed"].state == "user_error train"
    assert "damaged" in found["damaged"].state
    trains = found["sweep/lr=1e-3"]
    assert (trains.state, trains.step, trains.steps, trains.loss) == ("running train", 7, 40, 2.25)
    assert trains.left_s is not None
    assert 800 < trains.left_s <= 900


def test_slurm_is_asked_once_for_all_runs(tmp_path: Path, programs: Programs) -> None:
    folder = programs(squeue=SQUEUE, sacct=DONE)
    for number in range(20):
        launched(tmp_path / f"runs/{number}", number, train=str(200 + number))
    assert {item.state for item in listing.summaries(tmp_path / "runs")} == {"running train"}
    assert len((folder / "squeue.calls").read_text().splitlines()) == 1


def test_ls_prints_a_table_or_json(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert muster.main(["ls", str(runs)]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()] == [
        "run",
        "damaged",
        "done",
        *["sweep/lr=1e-2", "sweep/lr=1e-3"],
        "failed",
    ]
    assert "7/40" in text
    assert muster.main(["ls", str(runs / "done"), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["run"], one["state"]) == (str(runs / "done"), "completed")
    assert muster.main(["ls", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"no run in {tmp_path}/none\n"


def test_status_prints_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster.main(["status", str(runs / "failed"), "--json"]) == 1
    (job,) = json.loads(capsys.readouterr().out)
    assert (job["name"], job["state"], job["failed"], job["verdict"]["reason"]) == (
        "train",
        "FAILED",
        True,
        "no such file",
    )


def test_wait_ends_with_the_run(
    runs: Path, programs: Programs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert muster.main(["wait", str(runs / "done")]) == 0
    assert capsys.readouterr().out == "preprocess 101 completed\ntrain 102 completed\n"
    assert muster.main(["wait", str(runs / "failed")]) == 1
    # pending, then running, then ended
    run = runs / "sweep/lr=1e-2"
    asked = tmp_path / "asked"
    asked.write_text("0\n")
    programs(
        squeue=f'read n < "{asked}"; echo $((n + 1)) > "{asked}"; '
        'case $n in 0) echo "301|PENDING";; 1 | 2) echo "301|RUNNING";; esac',
        sacct="echo '301|COMPLETED'",
    )
    ended(run, "train", "301", "completed")
    capsys.readouterr()
    began = time.monotonic()
    assert muster.main(["wait", str(run), "--every", "0.1"]) == 0
    assert time.monotonic() - began >= 0.3
    assert capsys.readouterr().out == "train 301 completed\n"


def test_a_run_is_running_while_its_launch_holds_it(tmp_path: Path) -> None:
    run = launched(tmp_path / "run", 1)
    assert listing.summaries(run)[0].state == "no job"
    with lock.held(run):
        assert listing.summaries(run)[0].state == "running"


def test_a_list_reads_no_file_twice(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`muster ls` of 500 runs has to take less than three times `import hydra, submitit`."""
    opened: Counter[str] = Counter()
    real = Path.open

    def counted(path: Path, *words: object, **names: object) -> object:
        opened[str(path)] += 1
        return real(path, *words, **names)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", counted)
    assert len(listing.summaries(runs)) == 5
    assert opened[str(runs / "done/run.json")] == opened[str(runs / "done/jobs/train/attempt-1.json")] == 1
    assert max(opened.values()) == 1


def test_gpu_hours_are_those_of_all_attempts(tmp_path: Path, programs: Programs) -> None:
    """Two attempts of an earlier submission, one of them lost without a verdict, and one that runs, on another number of GPUs."""
    programs(squeue="echo '7|RUNNING'", sacct="exit 1", scontrol="exit 1")
    run, now = launched(tmp_path / "run", 1, train="7"), time.time()
    folder = run / "jobs/train"
    for number, (job_id, gpus, began) in enumerate((("5", 8, 7200), ("5", 8, 3600), ("7", 4, 1800)), 1):
        begun = {"job_id": job_id, "gpus": gpus, "started": now - began}
        write_json(folder / f"attempt-{number}/begin.json", begun)
        if number == 1:
            write_json(folder / "attempt-1.json", begun | {"status": "preempted", "ended": now - began + 900})
    (folder / "attempt-2/rank-0.log").write_text("")
    os.utime(folder / "attempt-2/rank-0.log", (now - 1800, now - 1800))  # its last sign of life
    [found] = listing.summaries(run)
    assert found.gpu_hours == pytest.approx(8 * 0.25 + 8 * 0.5 + 4 * 0.5, abs=0.05)
    assert found.state == "running train"


def test_scripts_that_wait_for_the_user_are_shown_with_what_submits_them(
    tmp_path: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue="exit 0", sacct="exit 1", scontrol="exit 1")
    run = tmp_path / "my runs/run"
    record.add_launch(run, [], "slurm", {}, ["preprocess", "train"])
    for name in ("preprocess", "train"):
        (run / "jobs" / name).mkdir(parents=True)
        (run / "jobs" / f"{name}.sbatch").write_text("")
    assert listing.summaries(run)[0].state == f"not submitted: bash '{run}/jobs/submit.sh'"
    assert muster.main(["status", str(run)]) == 0
    assert capsys.readouterr().out.count(f"not submitted  sbatch '{run}/jobs/") == 2
    # one waits in the queue, then runs, then has ended without an attempt: its log has its id
    programs(squeue=f"case $* in *%o*) echo '{run}/jobs/preprocess.sbatch|9|PENDING|me|x/preprocess|{run}/code';; esac")
    assert listing.summaries(run)[0].state == "pending preprocess"
    assert muster.main(["status", str(run)]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        ["preprocess", "9", "pending"],
        ["train", "not", "submitted"],
    ]
    programs(squeue="exit 0", sacct="echo '9|FAILED'")
    (run / "jobs/preprocess/9_0_log.out").write_text("module: command not found\n")
    assert listing.summaries(run)[0].state == "user_error preprocess"
    ended(run, "preprocess", "9", "completed")
    assert listing.summaries(run)[0].state == f"not submitted: sbatch '{run}/jobs/train.sbatch'"
    # a job of an earlier launch that is to be submitted again, and then has been
    ended(run, "train", "10", "completed")
    programs(sacct="echo '9|COMPLETED'; echo '10|COMPLETED'; echo '11|COMPLETED'")
    assert listing.summaries(run)[0].state == "completed"
    for path in run.glob("jobs/*/attempt-1/begin.json"):
        os.utime(path, (time.time() - 60, time.time() - 60))
    os.utime(run / "jobs/preprocess/9_0_log.out", (time.time() - 60, time.time() - 60))
    record.add_launch(run, [], "slurm", {}, ["train"])
    assert listing.summaries(run)[0].state == f"not submitted: sbatch '{run}/jobs/train.sbatch'"
    write_json(run / "jobs/train/attempt-2/begin.json", {"job_id": "11"})
    write_json(run / "jobs/train/attempt-2.json", {"job_id": "11", "status": "completed"})
    assert listing.summaries(run)[0].state == "completed"
