"""launcher/supervise/requeue.py: which end of a job is followed by another start, and what Slurm is asked."""

from pathlib import Path
from typing import Any

import pytest

from conf.files import read_json, write_json
from launcher.supervise import attempt, requeue
from tests.conftest import Programs


def ended(status: str, *, step: int = 0, resumed: int = 0, saved: int = 0, reason: str = "because") -> dict[str, Any]:
    """The verdict of an attempt that began at `resumed`, came to `step` and left a checkpoint of `saved`."""
    return {
        "status": status,
        "step": step,
        "resumed": resumed,
        "saved": saved,
        "host": "n2",
        "rank": 1,
        "reason": reason,
    }


def not_finite(step: int) -> dict[str, Any]:
    return ended("failed", step=step, reason=f"FloatingPointError: step {step + 1}: loss nan, gradient norm nan")


def on(status: str) -> dict[str, Any]:
    """An attempt that got further."""
    return ended(status, step=10, saved=10)


@pytest.mark.parametrize(
    ("attempts", "again", "says"),
    [
        ([on("completed")], False, ""),
        ([on("preempted")], True, "checkpoint"),
        ([on("time_limit")], True, "checkpoint"),
        ([on("preempted")] * 20, True, "checkpoint"),
        ([on("preempted"), ended("preempted")], True, "checkpoint"),
        ([ended("preempted")], True, "checkpoint"),
        ([ended("failed"), ended("preempted")], True, "checkpoint"),
        ([ended("failed"), ended("preempted"), ended("failed"), ended("failed")], False, "cluster.max_restarts=3"),
        ([on("stopped")], False, "stopped on request"),
        ([on("user_error")], False, "it would fail again"),
        ([ended("out_of_memory", step=5, resumed=5)], False, "before its first step"),
        ([ended("out_of_memory", step=6, resumed=5)], True, "restart 1 of 3"),
        ([ended("failed")], True, "restart 1 of 3"),
        ([ended("hang")], True, "restart 1 of 3"),
        ([ended("hang")] * 4, False, "cluster.max_restarts=3"),
        ([ended("nccl"), ended("failed")], True, "restart 2 of 3"),
        ([ended("bad_node"), ended("failed"), ended("nccl")], True, "restart 3 of 3"),
        ([ended("failed")] * 4, False, "cluster.max_restarts=3"),
        ([*[ended("failed")] * 3, on("failed")], True, "restart 1 of 3"),
        ([on("failed"), *[ended("failed")] * 3], False, "cluster.max_restarts=3"),
        ([on("failed")] * 20, True, "restart 1 of 3"),
        ([*[on("preempted")] * 20, ended("failed")], True, "restart 2 of 3"),
        ([not_finite(7)], True, "restart 1 of 3"),
        ([not_finite(7), not_finite(7)], False, "at the same step twice"),
        ([not_finite(7), not_finite(9)], True, "restart 2 of 3"),
        ([not_finite(7), ended("failed", step=7)], True, "restart 2 of 3"),
    ],
)
def test_whether_training_starts_again(attempts: list[dict[str, Any]], again: bool, says: str) -> None:
    decision = requeue.decide(attempts, 3, saves=True)
    assert (decision.again, decision.status) == (again, attempts[-1]["status"])
    assert says in decision.why


@pytest.mark.parametrize(
    "attempts",
    [
        [ended("preempted")] * 2,
        [ended("preempted"), ended("time_limit")],
        [on("preempted"), *[ended("time_limit")] * 2],
    ],
    ids=["preempted", "both", "after it got on"],
)
def test_two_stops_without_progress_are_enough(attempts: list[dict[str, Any]]) -> None:
    decision = requeue.decide(attempts, 3, saves=True)
    assert (decision.again, decision.status) == (False, "no_progress")
    assert "train.save_every" in decision.why


@pytest.mark.parametrize(
    ("status", "again"),
    [("preempted", True), ("failed", True), ("time_limit", False), ("out_of_memory", False), ("user_error", False)],
)
def test_a_job_without_checkpoints_begins_anew_where_that_helps(status: str, again: bool) -> None:
    assert requeue.decide([ended(status)], 3, saves=False).again is again
    assert not requeue.decide([ended(status)] * 4, 3, saves=False).again


@pytest.mark.parametrize("status", ["preempted", "time_limit", "failed", "nccl", "bad_node", "out_of_memory"])
def test_nothing_starts_again_where_that_is_turned_off(status: str) -> None:
    decision = requeue.decide([on(status)], None, saves=True)
    assert not decision.again
    assert "cluster.requeue=false" in decision.why


def test_no_restart_at_all_can_be_asked_for() -> None:
    assert not requeue.decide([ended("failed")], 0, saves=True).again
    assert requeue.decide([on("preempted")], 0, saves=True).again


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs/train"


def settle(folder: Path, verdict: dict[str, Any], restarts: int = 0) -> dict[str, Any]:
    """Settle the first attempt of job 7; what is written is what is returned."""
    write_json(folder / "attempt-1.json", verdict | {"attempt": 1, "job_id": "7"})
    settled = requeue.decide_and_requeue(folder, read_json(folder / "attempt-1.json"), 3, restarts)
    assert read_json(folder / "attempt-1.json") == settled
    return settled


SCONTROL = (
    """case "$*" in *"show job"*) """
    """echo "JobId=7 JobState={state} Reason={reason} Restarts={restarts} ExcNodeList={excluded}";; esac"""
)


def scontrol(state: str = "RUNNING", reason: str = "None", restarts: int = 0, excluded: str = "(null)") -> str:
    return SCONTROL.format(state=state, reason=reason, restarts=restarts, excluded=excluded)


def asked(programs: Path) -> list[str]:
    """What scontrol was asked to change."""
    return [line for line in (programs / "scontrol.calls").read_text().splitlines() if "show job" not in line]


def test_a_preempted_job_is_requeued(folder: Path, programs: Programs) -> None:
    path = programs(scontrol=scontrol())
    assert settle(folder, on("preempted"))["requeued"]
    assert asked(path) == ["requeue 7"]


@pytest.mark.parametrize(("excluded", "expected"), [("(null)", "n2"), ("n[5-6]", "n[5-6],n2")])
def test_a_bad_node_is_excluded_once_the_job_waits(
    folder: Path, programs: Programs, excluded: str, expected: str
) -> None:
    path = programs(scontrol=scontrol(excluded=excluded))
    assert settle(folder, ended("bad_node"))["next"].endswith(", without n2")
    assert asked(path) == ["requeue 7", f"update JobId=7 ExcNodeList={expected}"]


def test_a_node_that_cannot_be_excluded_is_named(folder: Path, programs: Programs) -> None:
    programs(scontrol=f'case "$1" in update) echo "Invalid node" >&2; exit 1;; esac\n{scontrol()}')
    verdict = settle(folder, ended("bad_node"))
    assert verdict["requeued"]
    assert "n2 could not be excluded (Invalid node)" in verdict["next"]


def test_what_slurm_requeues_itself_is_not_requeued_again(folder: Path, programs: Programs) -> None:
    path = programs(scontrol=scontrol("COMPLETING", restarts=1))
    verdict = settle(folder, on("preempted"))
    assert (verdict["status"], verdict["requeued"], verdict["next"]) == ("preempted", True, requeue.BY_SLURM)
    assert asked(path) == []


@pytest.mark.parametrize("rank", [1, None], ids=["saved", "killed before"])
def test_a_cancelled_job_stays_cancelled(folder: Path, programs: Programs, rank: int | None) -> None:
    path = programs(scontrol=scontrol("COMPLETING", restarts=2))
    verdict = settle(folder, on("preempted" if rank else "failed") | {"rank": rank}, restarts=2)
    assert (verdict["status"], verdict["requeued"], verdict["reason"]) == ("stopped", False, "cancelled: because")
    assert asked(path) == []


def test_a_job_past_its_time_limit_is_requeued(folder: Path, programs: Programs) -> None:
    path = programs(scontrol=scontrol("COMPLETING", reason="TimeLimit"))
    assert settle(folder, on("failed") | {"rank": None})["status"] == "time_limit"
    assert asked(path) == ["requeue 7"]


def test_a_failure_remains_one_when_the_job_is_cancelled(folder: Path, programs: Programs) -> None:
    programs(scontrol=scontrol("COMPLETING"))
    verdict = settle(folder, ended("nccl"))
    assert (verdict["status"], verdict["requeued"]) == ("nccl", False)


def test_a_job_that_slurm_refuses_to_requeue_says_so(folder: Path, programs: Programs) -> None:
    programs(scontrol=f'case "$1" in requeue) echo "Requeue is disabled" >&2; exit 1;; esac\n{scontrol()}')
    verdict = settle(folder, on("preempted"))
    assert not verdict["requeued"]
    assert "(Requeue is disabled); resume with python launch.py resume=RUN" in verdict["next"]


def test_a_node_without_scontrol_cannot_requeue_and_says_so(folder: Path, programs: Programs) -> None:
    programs()
    verdict = settle(folder, on("preempted"))
    assert not verdict["requeued"]
    assert "scontrol is not on PATH" in verdict["next"]


def test_attempts_of_an_earlier_submission_do_not_count(folder: Path, programs: Programs) -> None:
    programs(scontrol=scontrol())
    for number in range(1, 6):
        write_json(folder / f"attempt-{number}.json", ended("failed") | {"attempt": number, "job_id": "6"})
    write_json(folder / "attempt-6.json", ended("failed") | {"attempt": 6, "job_id": "7"})
    assert "restart 1 of 3" in requeue.decide_and_requeue(folder, read_json(folder / "attempt-6.json"), 3, 0)["next"]


def test_a_job_whose_batch_script_was_killed_is_requeued_by_rank_0(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = programs(scontrol=scontrol("COMPLETING", reason="JobLaunchFailure"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempt.begin(folder)
    attempt.record_end(folder, 1, 0, "preempted", "saved at step 7")
    attempt.finish_for_killed_script(folder, 1, 4, max_restarts=3)
    verdict = read_json(folder / "attempt-1.json")
    assert (verdict["requeued"], verdict["reason"]) == (True, "its batch script was killed: saved at step 7")
    assert asked(path) == ["requeue 7"]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_rank_0_leaves_the_verdict_to_the_batch_script(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    programs(scontrol=scontrol(state))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempt.finish_for_killed_script(folder, 1, 4, max_restarts=3)
    assert not folder.exists()


def test_rank_0_asks_nobody_outside_slurm(folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs()
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    attempt.finish_for_killed_script(folder, 1, 4, max_restarts=3)
    assert not folder.exists()


def test_a_controller_that_restarts_is_waited_for(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requeue, "PAUSE_S", 0.01)
    away = 'echo "Unable to contact slurm controller (connect failure)" >&2; exit 1'
    programs(scontrol=f'[ -e "{tmp_path}/back" ] || {{ : > "{tmp_path}/back"; {away}; }}\n{scontrol()}')
    assert settle(folder, on("preempted"))["requeued"]


def test_a_controller_that_stays_away_is_named(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "PAUSE_S", 0.01)
    monkeypatch.setattr(requeue, "WAIT_S", 0.05)
    programs(scontrol='echo "Unable to contact slurm controller (connect failure)" >&2; exit 1')
    verdict = settle(folder, on("preempted"))
    assert not verdict["requeued"]
    assert "Unable to contact slurm controller" in verdict["next"]
