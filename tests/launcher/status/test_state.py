"""launcher/status/state.py and the command `muster`: on run folders made by hand."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import RunError
from conf.files import read_json, write_json
from launcher.run_folder import record
from launcher.status import log_files
from launcher.status import state as state_module
from launcher.supervise import attempt
from tests.conftest import Programs, module, tool


def launched(run: Path, cluster: str, **jobs: str) -> None:
    """Add a launch to RUN/run.json."""
    launches = record.read_launches(run) if (run / "run.json").exists() else []
    write_json(run / "run.json", {"launches": [*launches, {"cluster": cluster, "jobs": jobs}]})


def ended(run: Path, job: str, job_id: str, status: str, reason: str = "") -> None:
    """Add an attempt of `job` that has ended."""
    folder = run / "jobs" / job
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", job_id)
        number = int(attempt.begin(folder)[0]["MUSTER_ATTEMPT"])
    attempt.record_end(folder, number, 0, status, reason, f"Traceback of {reason}" if reason else "")
    attempt.finish(folder, number, 0, 4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on Slurm: preprocess has completed, train is running, consolidate is pending."""
    run = tmp_path / "run"
    launched(run, "slurm", preprocess="101", train="102", consolidate="103")
    ended(run, "preprocess", "101", "completed")
    return run


SQUEUE = 'case "$*" in *--jobs*) echo "Dependency|N/A";; *) echo "102|RUNNING"; echo "103|PENDING";; esac'


def states(run: Path) -> dict[str, tuple[str, str, str | None]]:
    """Return (job id, state, status of the verdict) of each job."""
    return {
        job.name: (job.job_id, job.state, job.verdict["status"] if job.verdict else None)
        for job in state_module.job_states(run)
    }


def test_jobs_have_state_and_verdict(run: Path, programs: Programs) -> None:
    programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'")
    assert states(run) == {
        "preprocess": ("101", "COMPLETED", "completed"),
        "train": ("102", "RUNNING", None),
        "consolidate": ("103", "PENDING", None),
    }


def test_a_job_that_slurm_does_not_know_is_unknown(run: Path, programs: Programs) -> None:
    programs()
    assert {state for _, state, _ in states(run).values()} == {"UNKNOWN"}


def test_the_newest_start_of_a_job_counts(run: Path, programs: Programs) -> None:
    programs(squeue="echo '201|PENDING'")
    ended(run, "train", "102", "failed", "loss is nan")
    assert states(run)["train"] == ("102", "UNKNOWN", "failed")
    launched(run, "slurm", train="201")
    assert states(run)["train"] == ("201", "PENDING", None)
    assert states(run)["preprocess"][2] == "completed"


def test_jobs_are_in_the_order_of_the_pipeline(tmp_path: Path, programs: Programs) -> None:
    programs()
    launched(tmp_path, "slurm", generate="3", train="2", preflight="1")
    assert list(states(tmp_path)) == ["preflight", "train", "generate"]


@pytest.fixture
def local_run(tmp_path: Path) -> Iterator[Path]:
    """A run on this machine with a running training: a process with the run's folder in its command line."""
    run = tmp_path / "local"
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(run / "jobs/train")]
    with subprocess.Popen(command) as process:
        launched(run, "local", train=str(process.pid))
        while str(run).encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        yield run
        process.kill()


def test_a_local_job_runs_while_its_process_does(local_run: Path) -> None:
    assert [job.state for job in state_module.job_states(local_run)] == ["RUNNING"]


@pytest.mark.parametrize("job_id", [str(os.getpid()), "999999999", "local"], ids=["another's", "gone", "no id"])
def test_a_local_job_has_ended_if_its_process_is_gone(tmp_path: Path, job_id: str) -> None:
    launched(tmp_path / "run", "local", train=job_id)
    assert [job.state for job in state_module.job_states(tmp_path / "run")] == ["ENDED"]


def test_a_process_that_names_no_absolute_path_is_not_the_run(local_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_run.mkdir(exist_ok=True)
    monkeypatch.chdir(local_run)  # from here, any word is a path in the run
    with subprocess.Popen([tool("sleep"), "60"]) as stranger:
        launched(local_run, "local", train=str(stranger.pid))
        assert [job.state for job in state_module.job_states(local_run)] == ["ENDED"]
        stranger.kill()


def test_the_active_jobs_of_a_run_are_named(run: Path, programs: Programs) -> None:
    programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'")
    assert state_module.active_jobs(run) == "train 102 is RUNNING, consolidate 103 is PENDING"


def test_a_run_that_has_ended_is_not_active(run: Path, programs: Programs) -> None:
    programs(sacct='for id in 101 102 103; do echo "$id|COMPLETED"; done')
    assert state_module.active_jobs(run) is None


def test_a_preempted_job_that_slurm_puts_back_is_active(run: Path, programs: Programs) -> None:
    """Slurm 24.11 shows it as ended for a moment. It was taken for ended: a second training could be started, or none cancelled."""
    asked = run.parent / "asked"
    asked.write_text("0\n")
    programs(
        squeue=f'read n < "{asked}"; echo $((n + 1)) > "{asked}"; '
        'if [ $n = 0 ]; then echo "102|PREEMPTED"; else echo "102|PENDING"; fi',
        sacct='for id in 101 103; do echo "$id|COMPLETED"; done',
    )
    assert state_module.active_jobs(run) == "train 102 is PENDING"


def test_a_preempted_job_that_stays_so_has_ended(
    run: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "STARTS_AGAIN_S", 0.1)
    programs(sacct='echo "101|COMPLETED"; echo "102|PREEMPTED"; echo "103|CANCELLED"')
    assert state_module.active_jobs(run) is None


def test_a_folder_that_is_not_a_run_is_not_active(tmp_path: Path) -> None:
    assert state_module.active_jobs(tmp_path) is None


def test_a_folder_that_is_not_a_run_has_no_jobs(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=f"^RUN={tmp_path}: is not a run folder: it has no run.json. Name one that `muster ls` lists$"
    ):
        state_module.job_states(tmp_path)


def log(run: Path, name: str, age_s: float = 0, text: str = "") -> Path:
    path = run / "jobs/train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_the_log_of_a_rank_is_its_newest(tmp_path: Path) -> None:
    newest = log(tmp_path, "10_0_log.out", age_s=1)
    for name in ("9_0_log.out", "8_0_log.out"):
        log(tmp_path, name, age_s=60)
    for name in ("10_1_log.out", "10_10_log.out", "10_0_log.err"):
        log(tmp_path, name)
    assert log_files.newest(tmp_path, "train", 0) == newest


def test_a_missing_log_names_the_ranks_that_have_one(tmp_path: Path) -> None:
    for rank in (10, 9, 0):
        log(tmp_path, f"7_{rank}_log.out")
    with pytest.raises(RunError, match="^RANK=11: no log of train: there are ranks 0 to 10$"):
        log_files.newest(tmp_path, "train", 11)


def test_a_job_without_logs_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=f"^RANK=0: no log of train: the job has not written any yet. Its state: muster status {tmp_path}$",
    ):
        log_files.newest(tmp_path, "train", 0)


def test_status_shows_every_job(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'")
    done = module("launcher", "status", run, env=surroundings)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert rows[0] == ["job", "id", "state", "attempt", "verdict", "elapsed", "reason"]
    assert rows[1:] == [
        ["preprocess", "101", "completed", "1", "completed", "0:00:00"],
        ["train", "102", "running"],
        ["consolidate", "103", "pending", "waits", "for", "another", "job", "[Dependency]"],
    ]


def test_status_exits_with_1_when_a_job_has_failed(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    programs()
    ended(run, "train", "102", "failed", "loss is nan")
    done = module("launcher", "status", run, env=surroundings)
    assert done.returncode == 1
    assert "loss is nan" in done.stdout


def test_why_shows_why_a_job_waits_or_failed(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'; echo '102|FAILED'")
    ended(run, "train", "102", "failed", "loss is nan")
    launched(run, "slurm", evaluate="104")
    done = module("launcher", "why", run, env=surroundings)
    assert done.stdout.splitlines() == [
        "preprocess 101 completed",
        f"train 102 failed (rank 0 on {socket.gethostname()}): loss is nan",
        "Traceback of loss is nan",
        "consolidate 103 pending: waits for another job [Dependency]",
        "evaluate 104 unknown",
    ]


def test_logs_prints_the_log_of_a_rank(run: Path, surroundings: dict[str, str]) -> None:
    path = log(run, "102_1_log.out", text="step 1\nstep 2\n")
    done = module("launcher", "logs", run, "--rank", 1, env=surroundings)
    assert (done.returncode, done.stdout) == (0, f"==> {path}\nstep 1\nstep 2\n")


def test_cancel_ends_pending_and_running_jobs(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    folder = programs(squeue=SQUEUE, sacct="echo '101|COMPLETED'", scancel="exit 0")
    done = module("launcher", "cancel", run, env=surroundings)
    assert (done.returncode, done.stdout) == (0, "cancelled 2 jobs\n")
    assert (folder / "scancel.calls").read_text() == "102 103\n"


def test_cancel_never_gives_a_local_process_to_scancel(
    local_run: Path, programs: Programs, surroundings: dict[str, str]
) -> None:
    folder = programs(scancel="exit 0")
    module("launcher", "cancel", local_run, env=surroundings)
    assert not (folder / "scancel.calls").exists()


@pytest.mark.parametrize(
    "words",
    [["status", "{run}"], ["why", "{run}"], ["cancel", "{run}"], ["logs", "{run}"], ["resume", "{run}"]],
    ids=lambda words: words[0],
)
def test_a_folder_that_is_not_a_run_gives_no_traceback(
    tmp_path: Path, surroundings: dict[str, str], words: list[str]
) -> None:
    done = module("launcher", *(word.format(run=tmp_path / "nowhere") for word in words), env=surroundings)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_stop_writes_a_file_for_training(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    programs(squeue=SQUEUE)
    done = module("launcher", "stop", run, env=surroundings)
    assert (done.returncode, "will save" in done.stdout) == (0, True)
    assert (run / "jobs/train/stop").exists()


@pytest.mark.parametrize("state", ["PENDING", "COMPLETED"])
def test_only_running_training_can_be_stopped(
    run: Path, programs: Programs, surroundings: dict[str, str], state: str
) -> None:
    programs(squeue=f"echo '102|{state}'")
    done = module("launcher", "stop", run, env=surroundings)
    assert done.returncode == 2
    assert f"training is not running ({state.lower()}). To end pending jobs: muster cancel" in done.stderr
    assert not (run / "jobs/train/stop").exists()


def requeued(run: Path, number: int, **verdict: object) -> None:
    """An attempt of `train`, job 102, that Slurm was asked to start again."""
    folder = run / "jobs/train"
    ended(run, "train", "102", "preempted", "saved at step 7")
    path = folder / f"attempt-{number}.json"
    write_json(path, read_json(path) | {"requeued": True, "next": "continues from its checkpoint"} | verdict)


@pytest.mark.parametrize(
    ("state", "code"),
    [("PENDING", 0), ("CANCELLED", 1)],
    ids=["it starts again", "it has been cancelled"],
)
def test_a_job_that_starts_again_has_not_failed(
    run: Path, programs: Programs, surroundings: dict[str, str], state: str, code: int
) -> None:
    programs(squeue=f'case "$*" in *--jobs*) echo "BeginTime|N/A";; *) echo "102|{state}";; esac')
    requeued(run, 1)
    done = module("launcher", "status", run, env=surroundings)
    assert done.returncode == code
    assert "saved at step 7; continues from its checkpoint" in done.stdout


def test_why_shows_every_attempt(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    programs(sacct="echo '102|FAILED'")
    requeued(run, 1)
    ended(run, "train", "102", "failed", "loss is nan")
    path = run / "jobs/train/attempt-2.json"
    write_json(path, read_json(path) | {"remedy": "less of it", "log": "step 8\nstep 9"})
    done = module("launcher", "why", run, env=surroundings)
    assert done.stdout.splitlines()[1:8] == [
        "  attempt 1 preempted: saved at step 7; continues from its checkpoint",
        f"train 102 failed (rank 0 on {socket.gethostname()}): loss is nan",
        "remedy: less of it",
        "Traceback of loss is nan",
        "last lines of its log:",
        "step 8",
        "step 9",
    ]


def test_the_log_of_a_rank_is_that_of_its_newest_attempt(tmp_path: Path) -> None:
    for number, job_id in ((1, "7"), (2, "7"), (3, "123")):
        write_json(tmp_path / f"jobs/train/attempt-{number}/begin.json", {"job_id": job_id})
    log(tmp_path, "attempt-1/rank-0.log", age_s=60)
    newest = log(tmp_path, "attempt-2/rank-0.log", age_s=30)
    log(tmp_path, "7_0_log.out")  # the batch script's
    assert log_files.newest(tmp_path, "train", 0) == newest
    with pytest.raises(RunError, match="ranks 0 to 0"):
        log_files.newest(tmp_path, "train", 1)
    here = log(tmp_path, "123_0_log.out")  # a later start on this machine
    assert log_files.newest(tmp_path, "train", 0) == here


def test_the_log_of_the_batch_script_of_an_array_is_not_that_of_a_rank(tmp_path: Path) -> None:
    write_json(tmp_path / "jobs/train/attempt-1/begin.json", {"job_id": "123_4"})
    newest = log(tmp_path, "attempt-1/rank-0.log", age_s=30)
    log(tmp_path, "123_4_0_log.out")
    assert log_files.newest(tmp_path, "train", 0) == newest
    assert log_files.newest_of_all(tmp_path, "train") == [newest]
    with pytest.raises(RunError, match="ranks 0 to 0"):
        log_files.newest(tmp_path, "train", 1)
