"""`muster logs`: of one rank or all, with times, followed over attempts until the job ends."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.files import write_json
from launcher import __main__ as muster
from launcher.run_folder import lock
from launcher.status.follow import End, Follower
from tests.conftest import ROOT, Programs, module
from tests.launcher.status.test_state import ended, launched, log

DAY = "2026-11-30 10:00"


def attempt_log(run: Path, number: int, rank: int, text: str) -> Path:
    write_json(run / f"jobs/train/attempt-{number}/begin.json", {"job_id": "102"})
    return log(run, f"attempt-{number}/rank-{rank}.log", text=text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    launched(run, "slurm", train="102")
    attempt_log(run, 1, 0, f"starting\n{DAY}:01 rank 0 INFO one\n{DAY}:03 rank 0 INFO three\n  a detail\n")
    attempt_log(run, 1, 11, f"{DAY}:02 rank 11 INFO two\n")
    return run


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("==> /")]


def test_the_logs_of_all_ranks_are_merged_by_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, "102_0_log.out", text="the batch script's\n")
    assert muster.main(["logs", str(run), "--rank", "all"]) == 0
    assert printed(capsys) == [
        "rank 0  | starting",
        f"rank 0  | {DAY}:01 rank 0 INFO one",
        f"rank 11 | {DAY}:02 rank 11 INFO two",
        f"rank 0  | {DAY}:03 rank 0 INFO three",
        "rank 0  |   a detail",
    ]


def test_lines_without_a_time_get_that_of_the_line_before(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster.main(["logs", str(run), "--time"]) == 0
    first, *_, last = printed(capsys)
    assert (first, last) == (f"{'':19} starting", f"{DAY}:03   a detail")


def test_a_line_of_submitit_has_its_own_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt_log(run, 1, 0, f"{DAY}:01 rank 0 INFO one\nsubmitit INFO ({DAY}:09,162) - Job completed successfully\n")
    assert muster.main(["logs", str(run), "--time"]) == 0
    assert printed(capsys)[-1].startswith(f"{DAY}:09 submitit INFO")


def test_only_the_newest_attempt_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 11):
        log(run, f"attempt-1/rank-{rank}.log", age_s=60)
    attempt_log(run, 2, 0, "again\n")
    assert muster.main(["logs", str(run), "--rank", "all"]) == 0
    assert printed(capsys) == ["rank 0 | again"]


@pytest.mark.parametrize("rank", ["-1", "x", ""])
def test_a_rank_is_a_number_or_all(run: Path, capsys: pytest.CaptureFixture[str], rank: str) -> None:
    with pytest.raises(SystemExit):
        muster.main(["logs", str(run), f"--rank={rank}"])
    assert "is neither a number nor `all`" in capsys.readouterr().err


def after_each_look(*changes: Callable[[], object]) -> Callable[[], str | None]:
    """Make one change after another to the run, and end after the last one."""
    left = list(changes)

    def is_over() -> str | None:
        if not left:
            return "train completed"
        left.pop(0)()
        return None

    return is_over


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_new_lines_and_new_attempts_are_followed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.status.follow.POLL_S", 0)
    old = run / "jobs/train/attempt-1/rank-0.log"
    follower = Follower(run, "train", 0, with_time=True)
    follower.follow(
        after_each_look(
            lambda: append(old, "half "),
            lambda: append(old, "a line\n"),
            lambda: attempt_log(run, 2, 0, f"{DAY}:09 rank 0 INFO again\n"),
            lambda: append(old, "the last words\n"),
            lambda: append(run / "jobs/train/attempt-2/rank-0.log", "no end"),
        )
    )
    now = time.strftime("%Y-%m-%d")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"==> {old}"
    assert lines[5].startswith(now)
    assert [line[20:] for line in (lines[5], lines[8], lines[9])] == ["half a line", "the last words", "no end"]
    assert lines[6:8] == [f"==> {run}/jobs/train/attempt-2/rank-0.log", f"{DAY}:09 rank 0 INFO again"]
    assert lines[10:] == ["==> train completed"]


def test_a_log_that_is_not_there_yet_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.status.follow.POLL_S", 0)
    write = after_each_look(lambda: None, lambda: attempt_log(tmp_path, 1, 3, "first\n"), lambda: None)
    Follower(tmp_path, "train", None).follow(write)
    assert printed(capsys) == ["train has no log yet: waiting", "rank 3 | first", "==> train completed"]


def test_follow_ends_with_the_job(run: Path, programs: Programs, surroundings: dict[str, str]) -> None:
    """The whole command, on a job that Slurm still lists as running when its verdict is there."""
    programs(squeue="echo '102|RUNNING'")
    command = [sys.executable, "-m", "launcher", "logs", run, "-f"]
    with subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert next(process.stdout).startswith("==> ")
        ended(run, "train", "102", "completed")
        shown = process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == 0
    assert shown[-1] == "==> train completed"


@pytest.mark.parametrize(
    ("listed", "verdict", "over"),
    [
        ("RUNNING", None, None),
        ("PENDING", None, None),
        ("PENDING", {"status": "preempted", "requeued": True}, None),
        ("RUNNING", {"status": "failed"}, "train failed"),
        ("CANCELLED", None, "train stopped"),
    ],
)
def test_a_job_is_over_when_nothing_more_comes(
    tmp_path: Path, programs: Programs, listed: str, verdict: dict[str, object] | None, over: str | None
) -> None:
    programs(squeue=f"echo '102|{listed}'")
    launched(tmp_path, "slurm", train="102")
    write_json(tmp_path / "jobs/train/attempt-1/begin.json", {"job_id": "102", "started": 0})
    if verdict:
        write_json(tmp_path / "jobs/train/attempt-1.json", verdict | {"job_id": "102", "started": 0})
    assert End(tmp_path, "train")() == over


def test_the_verdict_of_a_local_job_is_waited_for(tmp_path: Path) -> None:
    """The launch writes it a moment after the last rank has ended."""
    launched(tmp_path, "local", train="999999999")
    (tmp_path / "jobs/train/attempt-1").mkdir(parents=True)
    is_over = End(tmp_path, "train")
    with lock.held(tmp_path):
        assert is_over() is None
        ended(tmp_path, "train", "1", "stopped")
        assert is_over() == "train stopped"


def test_a_missing_log_is_an_error_without_follow(tmp_path: Path, surroundings: dict[str, str]) -> None:
    launched(tmp_path, "local", train="1")
    done = module("launcher", "logs", tmp_path, "--rank", "all", env=surroundings)
    assert (done.returncode, "has not written any yet" in done.stderr) == (2, True)
