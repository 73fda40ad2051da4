"""`muster status`, `cancel` and `wait` on a sweep: folders made by hand, and small programs that stand for Slurm's."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import RunError
from conf.files import write_json
from launcher import __main__ as muster
from launcher.run_folder import lock, sweep_record
from launcher.status import find, state
from launcher.status import sweep as sweep_status
from tests.conftest import ROOT, Programs
from tests.launcher.status.test_state import ended


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of three runs: the first completed, the second is task 1 of array 12, the third was not started."""
    folder = tmp_path / "sweep"
    for number, name in enumerate(("a", "b")):
        slurm = {"train": {"slurm_name": "sweep/train", "folder": ".."}}
        launch = {"command": [], "cluster": "slurm", "jobs": {"train": f"12_{number}"}, "slurm": slurm}
        write_json(folder / name / "run.json", {"launches": [launch]})
    ended(folder / "a", "train", "12_0", "completed")
    (folder / "a/metrics.jsonl").write_text('{"step": 4, "loss": 1.5, "eval_loss": 2.0}\n')
    sweep_record.write(folder, {"a": {}, "b": {}, "c": {}}, [], merges_best_step=False)
    sweep_record.set_jobs(folder, {"consolidate": "13"})
    return folder


def squeue(sweep: Path, state: str = "RUNNING") -> str:
    lines = [f"12_1|{state}|me|sweep/train|{sweep}", f"13|PENDING|me|sweep/consolidate|{sweep}"]
    return "; ".join(f"echo '{line}'" for line in lines)


def test_status_shows_the_runs_and_the_jobs_of_the_best_one(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue=squeue(sweep), sacct="echo '12_0|COMPLETED'")
    assert muster.main(["status", str(sweep)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "completed", "4", "1.5000"] in shown
    assert ["b", "running", "train"] in shown
    assert ["not", "started:", "1", "run"] in shown
    assert ["consolidate", "13", "of", "the", "best", "run:", "pending"] in shown
    assert ["best", "so", "far", "a"] in shown
    assert muster.main(["why", str(sweep)]) == 0
    shown_by_why = ["==== a", "train 12_0 completed", "==== b", "train 12_1 running", "==== c", "not started"]
    assert capsys.readouterr().out.splitlines() == shown_by_why
    assert muster.main(["logs", str(sweep)]) == 2
    assert f"is a sweep. Name one of its runs:\n  muster logs {sweep}/a\n" in capsys.readouterr().err


def test_a_failed_run_is_seen_in_the_exit_code(sweep: Path, programs: Programs) -> None:
    programs(squeue=squeue(sweep), sacct="echo '12_0|COMPLETED'")
    ended(sweep / "b", "train", "12_1", "failed")
    assert muster.main(["status", str(sweep)]) == 1


def test_cancel_ends_the_task_and_what_waits_for_it(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = programs(squeue=squeue(sweep), sacct="echo '12_0|COMPLETED'", scancel=":")
    assert muster.main(["cancel", str(sweep)]) == 0
    assert capsys.readouterr().out == "cancelled 2 jobs\n"
    assert (folder / "scancel.calls").read_text() == "13\n12_1\n"


def test_a_task_of_another_sweep_with_the_same_id_is_left_alone(sweep: Path, programs: Programs) -> None:
    folder = programs(squeue=squeue(sweep.parent), sacct="exit 1", scontrol="exit 1", scancel=":")
    [job] = state.job_states(sweep / "b")
    assert (job.state, "now belongs to another job" in job.note) == ("UNKNOWN", True)
    assert muster.main(["cancel", str(sweep)]) == 0
    assert not (folder / "scancel.calls").exists()


def test_wait_returns_when_no_job_is_left(sweep: Path, programs: Programs) -> None:
    programs(squeue="echo '12_1|COMPLETED'", sacct="echo '12_0|COMPLETED'; echo '13|COMPLETED'")
    assert muster.main(["wait", str(sweep)]) == 1  # the third run was not started
    ended(sweep / "b", "train", "12_1", "completed")
    sweep_record.write(sweep, {"a": {}, "b": {}}, [], merges_best_step=False)
    assert muster.main(["wait", str(sweep)]) == 0


def test_a_job_of_the_best_run_is_known_by_the_attempt_that_it_opened(sweep: Path, programs: Programs) -> None:
    begun = {"job_id": "13", "folder": "..", "host": "n1", "started": 0.0}
    write_json(sweep / "a/jobs/consolidate/attempt-1/begin.json", begun)
    programs(squeue=squeue(sweep).replace("PENDING", "RUNNING"), sacct="echo '12_0|COMPLETED'")
    assert {job.name: job.state for job in state.job_states(sweep / "a")} == {
        "train": "COMPLETED",
        "consolidate": "RUNNING",
    }


def test_the_run_of_a_task_is_found_by_its_id(sweep: Path, programs: Programs) -> None:
    programs(squeue=squeue(sweep), sacct="exit 1", scontrol="exit 1")
    assert find.run_of(Path("12_1")) == sweep / "b"
    assert find.run_of(Path("13")) == sweep, "the best run is not known yet"
    write_json(sweep / "b/jobs/consolidate/attempt-1/begin.json", {"job_id": "13", "folder": ".."})
    assert find.run_of(Path("13")) == sweep / "b"


def test_the_run_of_a_task_that_slurm_has_forgotten_is_found_in_runs(
    sweep: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(squeue="exit 0", sacct="exit 1", scontrol="exit 1")
    sweep.parent.joinpath("runs").mkdir()
    sweep.rename(sweep.parent / "runs/sweep")
    monkeypatch.chdir(sweep.parent)
    found = {word: find.run_of(Path(word)) for word in ("12_0", "12", "13")}
    runs = sweep.parent / "runs/sweep"
    assert found == {"12_0": runs / "a", "12": runs, "13": runs}
    with pytest.raises(RunError, match="no run below runs/ has started it"):
        find.run_of(Path("12_2"))


def test_only_the_jobs_of_one_kind_are_cancelled(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = programs(squeue=squeue(sweep), sacct="echo '12_0|COMPLETED'", scancel=":")
    assert muster.main(["cancel", str(sweep), "--job", "train"]) == 0
    assert (folder / "scancel.calls").read_text() == "12_1\n"
    assert muster.main(["cancel", str(sweep), "--job", "consolidate"]) == 0
    assert (folder / "scancel.calls").read_text() == "12_1\n13\n"
    assert muster.main(["cancel", str(sweep), "--job", "push"]) == 2
    assert "JOB=push: is not pending or running in any run of the sweep" in capsys.readouterr().err


def test_cancel_ends_the_launch_that_would_start_the_next_run(sweep: Path, programs: Programs) -> None:
    programs(squeue="exit 0", sacct="echo '12_0|COMPLETED'", scancel=":")
    code = "import sys, time; from launcher.run_folder.lock import *\nwith held(Path(sys.argv[1])): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, sweep], cwd=ROOT) as launch:
        while lock.holder(sweep) is None:
            assert launch.poll() is None
        assert sweep_status.look(sweep).is_live
        assert muster.main(["cancel", str(sweep)]) == 0
        assert launch.wait() == -signal.SIGTERM
    assert lock.holder(sweep) is None


def test_cancel_ends_no_other_process_that_the_record_names(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue="exit 0", sacct="echo '12_0|COMPLETED'", scancel=":")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander, lock.held(sweep):
        record = sweep / lock.RECORD
        record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": bystander.pid}))
        assert muster.main(["cancel", str(sweep)]) == 2
        assert f"has a record of process {bystander.pid} of " in capsys.readouterr().err
        assert bystander.poll() is None
        bystander.kill()


def test_watch_ends_with_the_last_job_of_a_sweep(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue="echo '12_1|COMPLETED'", sacct="echo '12_0|COMPLETED'; echo '13|COMPLETED'")
    ended(sweep / "b", "train", "12_1", "failed", "out of memory")
    assert muster.main(["status", str(sweep), "--watch", "--every", "0.1"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2:4] for line in shown[:2]] == [["a", "completed"], ["b", "train"]]
    assert shown[-1] == "best a"


def test_the_state_of_a_sweep_for_scripts_is_that_of_all_its_jobs(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue=squeue(sweep), sacct="echo '12_0|COMPLETED'")
    jobs_of_run = "jobs:\n- preprocess\n- train\n- consolidate\nsweep:\n  merge: best\n"
    (sweep / "b/config.yaml").write_text(jobs_of_run)
    (sweep / "a/config.yaml").write_text(jobs_of_run.replace("best", "all"))
    assert muster.main(["status", str(sweep), "--json"]) == 0
    jobs = json.loads(capsys.readouterr().out)
    assert [(Path(job["run"]).name, job["job_id"], job["state"]) for job in jobs] == [
        ("a", "12_0", "COMPLETED"),
        ("a", "", "TO_COME"),
        ("b", "12_1", "RUNNING"),
    ]


def test_stop_lets_the_trainings_that_run_save_and_cancels_the_rest(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = programs(squeue=squeue(sweep), sacct="echo '12_0|COMPLETED'", scancel=":")
    assert muster.main(["save", str(sweep)]) == 0
    assert "1 training will save at the next step and go on" in capsys.readouterr().out
    assert (sweep / "b/jobs/train/save").exists()
    assert muster.main(["stop", str(sweep)]) == 0
    assert "1 training will save and end; 1 job that had not begun cancelled" in capsys.readouterr().out
    assert (sweep / "b/jobs/train/stop").exists()
    assert (folder / "scancel.calls").read_text() == "13\n"
    programs(squeue="echo '12_1|COMPLETED'", sacct="echo '12_0|COMPLETED'; echo '13|COMPLETED'")
    for command, message in (("stop", "has no pending or running job"), ("save", "has no training that runs")):
        assert muster.main([command, str(sweep)]) == 2
        assert message in capsys.readouterr().err


def test_merge_and_push_take_the_best_run_of_a_sweep(sweep: Path, programs: Programs) -> None:
    programs(squeue="exit 0", sacct="echo '12_0|COMPLETED'")
    assert sweep_status.require_best(sweep) == sweep / "a"
    (sweep / "a/jobs/train/attempt-1.json").unlink()
    with pytest.raises(RunError, match="has no run that was trained to the end. Name a run: muster ls"):
        sweep_status.require_best(sweep)


def test_on_this_machine_all_trainings_are_cancelled_not_only_the_one_that_runs(
    sweep: Path, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(squeue="exit 0", sacct="echo '12_0|COMPLETED'", scancel=":")
    for name in ("a", "b", "c"):
        (sweep / name).mkdir(exist_ok=True)
        (sweep / name / "config.yaml").write_text("jobs:\n- train\n- consolidate\n")
    with lock.held(sweep):
        assert muster.main(["cancel", str(sweep), "--job", "train"]) == 0
        assert capsys.readouterr().out == "cancelled 2 jobs\n", "those of b and c; a has trained"
        assert sweep_record.cancelled(sweep) == {"train"}
        assert muster.main(["cancel", str(sweep), "--job", "push"]) == 2
        assert sweep_record.cancelled(sweep) == {"train"}


@pytest.mark.proof
def test_cancelled_trainings_of_this_machine_do_not_start_and_the_best_run_is_merged(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    words = [
        "cluster.train.ranks_per_node=1", "train.global_batch=8", "train.steps=8", "data.max_rows=60", "train.eval_every=0",
        "train.precision=fp32", "jobs=[preprocess,train,consolidate]", "consolidate.verify=weights", f"run_dir={sweep}",
    ]  # fmt: skip
    command = [sys.executable, ROOT / "launch.py", "-m", "train.learning_rate=1e-3,2e-3,3e-3", *words]
    first, second, third = (sweep / f"train.learning_rate={rate}" for rate in ("1e-3", "2e-3", "3e-3"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launch:
        while not (second / "jobs/train/attempt-1/begin.json").exists():
            assert launch.poll() is None
            time.sleep(0.2)
        assert muster.main(["cancel", str(sweep), "--job", "train"]) == 0
        said = launch.communicate(timeout=300)[0]
    assert launch.returncode == 1
    assert "==== run 3 of 3: train.learning_rate=3e-3\ncancelled by muster cancel" in said
    assert [sweep_record.has_ended(run) for run in (first, second, third)] == [True, False, False]
    assert [(run / "model").exists() for run in (first, second, third)] == [True, False, False]
