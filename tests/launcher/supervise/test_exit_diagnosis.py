"""launcher/supervise/exit_diagnosis.py: the cause of an attempt's end, from the ranks' records and srun's errors."""

import time
from pathlib import Path

import pytest

from conf.files import write_json
from launcher.supervise import attempt
from launcher.supervise.exit_diagnosis import diagnose_exit

KILLED = """srun: error: n2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=3.0
srun: error: n1: tasks 0-1: Killed
"""
VICTIM = "RuntimeError: Connection closed by peer [10.0.0.1]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "attempt-1").mkdir()
    return tmp_path


def record_rank(folder: Path, rank: int, status: str, reason: str = "") -> None:
    attempt.record_end(folder, 1, rank, status, reason, remedy="do this")


def srun(folder: Path, text: str) -> None:
    (folder / "attempt-1/srun.log").write_text(text)


def diagnosis(folder: Path) -> tuple[str, int | None, str]:
    verdict = diagnose_exit(folder / "attempt-1", 137, 4)
    return verdict["status"], verdict["rank"], verdict["reason"]


@pytest.mark.parametrize(
    ("text", "status", "rank", "reason"),
    [
        (KILLED, "failed", 3, "killed by a signal (Killed)"),
        ("srun: error: n2: tasks 2-3: Segmentation fault (core dumped)\n", "failed", 2, "Segmentation fault"),
        ("srun: error: n2: task 3: Out Of Memory\n", "out_of_memory", 3, "no host memory left"),
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=3.0.\n" + KILLED,
            "out_of_memory",
            3,
            "no host memory",
        ),
        ("srun: error: n2: task 3: User defined signal 2\n", "preempted", 3, "during startup"),
        ("srun: error: n2: task 3: Terminated\n", "preempted", 3, "during startup"),
        ("srun: error: Node failure on n2\n" + KILLED, "bad_node", None, "Node failure on n2"),
        ("srun: error: Task launch for StepId=3.0 failed on node n2: Timeout\n", "bad_node", None, "failed on node n2"),
        (
            "srun: error: n2: task 3: Exited with exit code 1\n" + KILLED,
            "failed",
            None,
            "killed before they could record why",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_srun_names_a_rank_without_a_record(
    folder: Path, text: str, status: str, rank: int | None, reason: str
) -> None:
    srun(folder, text)
    assert diagnosis(folder)[:2] == (status, rank)
    assert reason in diagnosis(folder)[2]
    if status == "bad_node" or rank is not None:
        assert diagnose_exit(folder / "attempt-1", 137, 4)["host"] == "n2"


def test_an_oom_kill_is_found_in_the_ranks_own_log(folder: Path) -> None:
    srun(folder, KILLED)
    (folder / "attempt-1/rank-3.log").write_text("step 7\nslurmstepd: error: Detected 2 oom-kill event(s)\n")
    assert diagnosis(folder)[:2] == ("out_of_memory", 3)


def test_a_killed_rank_is_the_cause_and_lost_connections_are_not(folder: Path) -> None:
    srun(folder, KILLED)
    record_rank(folder, 0, "nccl", VICTIM)
    assert diagnosis(folder)[:2] == ("failed", 3)


def test_a_recorded_end_outweighs_a_later_signal(folder: Path) -> None:
    srun(folder, "srun: error: n2: task 3: Aborted\n")
    record_rank(folder, 3, "preempted", "saved at step 7")
    assert diagnosis(folder) == ("preempted", 3, "saved at step 7")


def test_an_exception_outweighs_sruns_report(folder: Path) -> None:
    srun(folder, KILLED)
    record_rank(folder, 1, "user_error", "no rows")
    assert diagnosis(folder) == ("user_error", 1, "no rows")


@pytest.mark.parametrize("status", ["preempted", "time_limit", "stopped"])
def test_connections_lost_to_a_stopped_rank_are_not_the_cause(folder: Path, status: str) -> None:
    record_rank(folder, 0, "nccl", VICTIM)
    record_rank(folder, 2, status, "saved at step 7")
    assert diagnosis(folder) == (status, 2, "saved at step 7")


HANG = {"status": "hang", "reason": "rank 3 on n2 hangs", "remedy": "look", "rank": 3, "host": "n2", "error": "stack"}


def write_hang(folder: Path, later_s: float = 0) -> None:
    write_json(folder / "attempt-1/hang.json", HANG | {"time": time.time() + later_s})


def test_a_hang_outweighs_killed_ranks_and_nccl_timeouts(folder: Path) -> None:
    record_rank(folder, 0, "nccl", "DistBackendError: Watchdog caught collective operation timeout")
    write_hang(folder)
    record_rank(folder, 1, "failed", VICTIM)
    srun(folder, KILLED)
    assert diagnosis(folder) == ("hang", 3, "rank 3 on n2 hangs")
    assert diagnose_exit(folder / "attempt-1", 137, 4)["error"] == "stack"


@pytest.mark.parametrize(("later_s", "status"), [(60, "user_error"), (-60, "hang")], ids=["before", "since"])
def test_a_rank_that_failed_before_the_others_hung_is_the_cause(folder: Path, later_s: float, status: str) -> None:
    record_rank(folder, 1, "user_error", "no rows")
    write_hang(folder, later_s)
    assert diagnosis(folder)[0] == status


def test_the_log_of_a_rank_of_the_local_executor_is_used(folder: Path) -> None:
    (folder / "77_2_log.out").write_text("the last line\n")
    record_rank(folder, 2, "failed", "nan")
    assert diagnose_exit(folder / "attempt-1", 1, 4)["log"] == "the last line"


def test_the_verdict_has_the_remedy_and_the_last_lines_of_the_log(folder: Path) -> None:
    record_rank(folder, 2, "failed", "nan")
    text = (
        "".join(f"line {number}\n" for number in range(5000))
        + "2026-11-28 10:00:00 rank 0 INFO environment {...}\nTraceback: nan\n"
    )
    (folder / "attempt-1/rank-2.log").write_text(text)
    verdict = diagnose_exit(folder / "attempt-1", 1, 4)
    assert verdict["remedy"] == "do this"
    assert verdict["log"].splitlines()[-2:] == ["line 4999", "Traceback: nan"]
    assert len(verdict["log"].splitlines()) == 20


def test_a_completed_attempt_has_no_log(folder: Path) -> None:
    record_rank(folder, 0, "completed")
    (folder / "attempt-1/rank-0.log").write_text("all good\n")
    assert diagnose_exit(folder / "attempt-1", 0, 4)["log"] == ""


IMAGE = "FATAL:   could not open image /images/none.sif: failed to retrieve path\n"


def test_a_rank_that_never_started_is_the_cause_and_those_told_to_stop_are_not(folder: Path) -> None:
    """srun ends the ranks of the other node with SIGTERM, which they take for a request to stop."""
    record_rank(folder, 0, "preempted", "told to stop by SIGTERM")
    (folder / "attempt-1/rank-2.log").write_text(IMAGE)
    srun(folder, "srun: error: n2: tasks 2-3: Exited with exit code 255\n")
    assert diagnosis(folder) == ("user_error", 2, IMAGE.strip())


def test_a_step_that_was_refused_is_the_cause(folder: Path) -> None:
    line = "srun: error: Unable to create step for job 7: More processors requested than permitted"
    srun(folder, f"{line}\n")
    assert diagnosis(folder) == ("user_error", None, line)


def test_an_error_of_srun_that_may_pass_is_named_but_not_the_users(folder: Path) -> None:
    srun(folder, "srun: error: Unable to confirm allocation for job 7: Socket timed out on send/recv operation\n")
    status, _, reason = diagnosis(folder)
    assert status == "failed"
    assert "before the ranks could record why: srun: error: Unable to confirm allocation" in reason


def test_the_logs_of_a_planned_stop_are_not_searched(folder: Path) -> None:
    for rank in range(4):
        record_rank(folder, rank, "time_limit", "saved")
        (folder / f"attempt-1/rank-{rank}.log").write_text("OSError: [Errno 28] No space left on device\n")
    assert diagnosis(folder) == ("time_limit", 0, "saved")
