"""launcher/status/missing_verdict.py: jobs that Slurm ended without a verdict, in each of its states, in plain words."""

import os
from pathlib import Path

import pytest

from launcher.status import missing_verdict
from launcher.status import state as state_module
from launcher.supervise import attempt
from tests.conftest import Programs
from tests.launcher.status.test_state import launched

STATES = {
    "NODE_FAIL": ("bad_node", "lost a node"),
    "BOOT_FAIL": ("bad_node", "did not boot"),
    "OUT_OF_MEMORY": ("out_of_memory", "more host memory"),
    "DEADLINE": ("user_error", "deadline"),
    "TIMEOUT": ("time_limit", "time limit was over"),
    "PREEMPTED": ("preempted", "took its nodes"),
    "REVOKED": ("stopped", "federation"),
    "CANCELLED": ("stopped", "cancelled by root before it started"),
    "FAILED": ("user_error", "exit code 3 before an attempt began: it printed nothing"),
    "COMPLETED": ("failed", "before an attempt began"),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    launched(tmp_path, "slurm", train="102")
    (tmp_path / "jobs/train").mkdir(parents=True)
    return tmp_path


def verdict_in(state: str, run: Path, programs: Programs, reason: str = "None") -> dict[str, str] | None:
    """The verdict of the run's training when Slurm says that it is in a state."""
    programs(
        squeue=f"echo '102|{state}'",
        sacct=f"echo '{state}{' by 0' if state == 'CANCELLED' else ''}'",
        scontrol=f"echo 'JobId=102 JobState={state} Reason={reason} ExitCode=3:0'",
    )
    [job] = state_module.job_states(run)
    assert job.failed == (job.verdict is not None)
    return job.verdict


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_a_job_without_an_attempt_has_words(state: str, run: Path, programs: Programs) -> None:
    verdict = verdict_in(state, run, programs)
    assert verdict
    assert (verdict["status"], STATES[state][1] in verdict["reason"]) == (STATES[state][0], True), verdict
    assert "muster resume" in verdict["next"]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_HOLD", "UNKNOWN"])
def test_a_job_that_has_not_ended_has_no_verdict(state: str, run: Path, programs: Programs) -> None:
    assert verdict_in(state, run, programs) is None


def test_a_job_whose_predecessor_failed_was_not_started(run: Path, programs: Programs) -> None:
    verdict = verdict_in("CANCELLED", run, programs, reason="DependencyNeverSatisfied")
    assert verdict and verdict["reason"] == "not started: a job that it needs did not complete"


def test_the_log_of_the_batch_script_says_why(run: Path, programs: Programs) -> None:
    (run / "jobs/train/102_0_log.out").write_text("a\n/spool/slurm_script: line 9: module: command not found\nb\n")
    verdict = verdict_in("FAILED", run, programs)
    assert verdict and (verdict["status"], verdict["reason"]) == (
        "user_error",
        "batch script, line 9: module: command not found",
    )
    assert verdict["log"].endswith("\nb")


def test_an_attempt_that_slurm_ended_before_its_verdict_has_one(
    run: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    attempt.begin(run / "jobs/train")
    (run / "jobs/train/102_0_log.out").write_text("OSError: [Errno 28] No space left on device\n")
    verdict = verdict_in("FAILED", run, programs)
    assert verdict and verdict["status"] == "user_error"
    verdict = verdict_in("NODE_FAIL", run, programs)
    assert verdict and verdict["status"] == "bad_node"
    verdict = verdict_in("CANCELLED", run, programs)
    assert verdict and verdict["reason"] == "cancelled by root before its ranks could save"


def test_a_job_that_slurm_has_forgotten_has_ended_if_its_script_ran(run: Path, programs: Programs) -> None:
    log = run / "jobs/train/102_0_log.out"
    log.write_text("no licence\n")
    assert verdict_in("UNKNOWN", run, programs) is None  # it may be about to open its attempt
    os.utime(log, (0, 0))
    verdict = verdict_in("UNKNOWN", run, programs)
    assert verdict and verdict["status"] == "failed"
    assert verdict["reason"].startswith("Slurm no longer knows the job: it ended")
    assert verdict["reason"].endswith("before an attempt began: no licence")


def test_a_log_that_slurm_could_not_open_is_named(run: Path, programs: Programs) -> None:
    programs(scontrol="echo 'JobId=102 ExitCode=0:53'")
    verdict = missing_verdict.explain(run / "jobs/train", "102", "FAILED", None)
    assert verdict and "could not open the log" in verdict["reason"]
    assert str(run) in verdict["remedy"]
