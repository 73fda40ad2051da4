"""launcher/supervise/requeue.py: after which ends a job starts again, and what Slurm is changes_asked to do."""

from pathlib import Path
from typing import Any

import pytest

from conf.files import read_json, write_json
from launcher import slurm_command
from launcher.supervise import attempt, requeue
from tests.conftest import Programs


def ended(status: str, *, step: int = 0, resumed: int = 0, saved: int = 0, reason: str = "because") -> dict[str, Any]:
    """The verdict of an attempt that started from checkpoint `resumed`, reached `step` and left checkpoint `saved`."""
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


def progressed(status: str) -> dict[str, Any]:
    """The verdict of an attempt that left a new checkpoint."""
    return ended(status, step=10, saved=10)


@pytest.mark.parametrize(
    ("attempts", "again", "text"),
    [
        ([progressed("completed")], False, ""),
        ([progressed("preempted")], True, "checkpoint"),
        ([progressed("time_limit")], True, "checkpoint"),
        ([progressed("preempted")] * 20, True, "checkpoint"),
        ([progressed("preempted"), ended("preempted")], True, "checkpoint"),
        ([ended("preempted")], True, "checkpoint"),
        ([ended("failed"), ended("preempted")], True, "checkpoint"),
        ([ended("failed"), ended("preempted"), ended("failed"), ended("failed")], False, "cluster.max_restarts=3"),
        ([progressed("stopped")], False, "stopped on request"),
        ([progressed("user_error")], False, "it would fail again"),
        ([ended("out_of_memory", step=5, resumed=5)], False, "before its first step"),
        ([ended("out_of_memory", step=6, resumed=5)], True, "restart 1 of 3"),
        ([ended("failed")], True, "restart 1 of 3"),
        ([ended("hang")], True, "restart 1 of 3"),
        ([ended("hang")] * 4, False, "cluster.max_restarts=3"),
        ([ended("nccl"), ended("failed")], True, "restart 2 of 3"),
        ([ended("bad_node"), ended("failed"), ended("nccl")], True, "restart 3 of 3"),
        ([ended("failed")] * 4, False, "cluster.max_restarts=3"),
        ([*[ended("failed")] * 3, progressed("failed")], True, "restart 1 of 3"),
        ([progressed("failed"), *[ended("failed")] * 3], False, "cluster.max_restarts=3"),
        ([progressed("failed")] * 20, True, "restart 1 of 3"),
        ([*[progressed("preempted")] * 20, ended("failed")], True, "restart 2 of 3"),
        ([not_finite(7)], True, "restart 1 of 3"),
        ([not_finite(7), not_finite(7)], False, "at the same step twice"),
        ([not_finite(7), not_finite(9)], True, "restart 2 of 3"),
        ([not_finite(7), ended("failed", step=7)], True, "restart 2 of 3"),
    ],
)
def test_whether_training_starts_again(attempts: list[dict[str, Any]], again: bool, text: str) -> None:
    decision = requeue.decide(attempts, 3, saves=True)
    assert (decision.again, decision.status) == (again, attempts[-1]["status"])
    assert text in decision.why


@pytest.mark.parametrize(
    "attempts",
    [
        [ended("preempted", step=9)] * 2,
        [ended("preempted", step=9), ended("time_limit")],
        [ended("time_limit"), ended("preempted"), ended("time_limit")],
        [progressed("preempted"), *[ended("time_limit")] * 2],
    ],
    ids=["preempted", "both", "with one at the start between", "after progress"],
)
def test_two_stops_without_progress_end_the_job(attempts: list[dict[str, Any]]) -> None:
    decision = requeue.decide(attempts, 3, saves=True)
    assert (decision.again, decision.status) == (False, "no_progress")
    assert "train.save_every" in decision.why


@pytest.mark.parametrize(("max_restarts", "allowed"), [(3, 3), (1, 1), (0, 1)])
def test_a_preemption_before_the_first_step_says_nothing_about_the_settings(max_restarts: int, allowed: int) -> None:
    """Nobody chooses when Slurm preempts: twice in a row during a slow start does not end the run."""
    first = ended("preempted", step=40, resumed=20, saved=40)
    at_start = ended("preempted", step=40, resumed=40, saved=40)
    assert requeue.decide([first, *[at_start] * allowed], max_restarts, saves=True).again
    decision = requeue.decide([first, *[at_start] * (allowed + 1)], max_restarts, saves=True)
    assert (decision.again, decision.status) == (False, "no_progress")
    assert f"cluster.max_restarts={max_restarts}" in decision.why


@pytest.mark.parametrize(
    ("status", "again"),
    [("preempted", True), ("failed", True), ("time_limit", False), ("out_of_memory", False), ("user_error", False)],
)
def test_a_job_without_checkpoints_starts_over_if_that_helps(status: str, again: bool) -> None:
    assert requeue.decide([ended(status)], 3, saves=False).again is again
    assert not requeue.decide([ended(status)] * 4, 3, saves=False).again


@pytest.mark.parametrize("status", ["preempted", "time_limit", "failed", "nccl", "bad_node", "out_of_memory"])
def test_nothing_starts_again_with_requeue_false(status: str) -> None:
    decision = requeue.decide([progressed(status)], None, saves=True)
    assert not decision.again
    assert "cluster.requeue=false" in decision.why


def test_max_restarts_0_allows_only_planned_stops() -> None:
    assert not requeue.decide([ended("failed")], 0, saves=True).again
    assert requeue.decide([progressed("preempted")], 0, saves=True).again


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs/train"


def requeue_first_attempt(folder: Path, verdict: dict[str, Any], restarts: int = 0) -> dict[str, Any]:
    """Requeue the first attempt of job 7. Checks that the returned verdict is also the one on disk."""
    write_json(folder / "attempt-1.json", verdict | {"attempt": 1, "job_id": "7"})
    changed = requeue.decide_and_requeue(folder, read_json(folder / "attempt-1.json"), 3, restarts)
    assert read_json(folder / "attempt-1.json") == changed
    return changed


SCONTROL = (
    """case "$*" in *"show job"*) """
    """echo "JobId=7 JobState={state} Reason={reason} Restarts={restarts} ExcNodeList={excluded}";; esac"""
)


def scontrol(state: str = "RUNNING", reason: str = "None", restarts: int = 0, excluded: str = "(null)") -> str:
    return SCONTROL.format(state=state, reason=reason, restarts=restarts, excluded=excluded)


def changes_asked(programs: Path) -> list[str]:
    """Return the calls of scontrol that change something."""
    return [line for line in (programs / "scontrol.calls").read_text().splitlines() if "show job" not in line]


def test_a_preempted_job_is_requeued(folder: Path, programs: Programs) -> None:
    path = programs(scontrol=scontrol())
    assert requeue_first_attempt(folder, progressed("preempted"))["requeued"]
    assert changes_asked(path) == ["requeue 7"]


@pytest.mark.parametrize(("excluded", "expected"), [("(null)", "n2"), ("n[5-6]", "n[5-6],n2")])
def test_a_bad_node_is_excluded_once_the_job_is_pending(
    folder: Path, programs: Programs, excluded: str, expected: str
) -> None:
    path = programs(scontrol=scontrol(excluded=excluded))
    assert requeue_first_attempt(folder, ended("bad_node"))["next"].endswith(", without n2")
    assert changes_asked(path) == ["requeue 7", f"update JobId=7 ExcNodeList={expected}"]


def test_a_node_that_cannot_be_excluded_is_named(folder: Path, programs: Programs) -> None:
    programs(scontrol=f'case "$1" in update) echo "Invalid node" >&2; exit 1;; esac\n{scontrol()}')
    verdict = requeue_first_attempt(folder, ended("bad_node"))
    assert verdict["requeued"]
    assert "n2 could not be excluded (Invalid node)" in verdict["next"]


def test_a_job_that_slurm_has_requeued_is_not_requeued_again(folder: Path, programs: Programs) -> None:
    path = programs(scontrol=scontrol("COMPLETING", restarts=1))
    verdict = requeue_first_attempt(folder, progressed("preempted"))
    assert (verdict["status"], verdict["requeued"], verdict["next"]) == ("preempted", True, requeue.BY_SLURM)
    assert changes_asked(path) == []


@pytest.mark.parametrize("rank", [1, None], ids=["saved", "killed before"])
def test_a_cancelled_job_stays_cancelled(folder: Path, programs: Programs, rank: int | None) -> None:
    path = programs(scontrol=scontrol("COMPLETING", restarts=2))
    verdict = requeue_first_attempt(folder, progressed("preempted" if rank else "failed") | {"rank": rank}, restarts=2)
    assert (verdict["status"], verdict["requeued"], verdict["reason"]) == ("stopped", False, "cancelled: because")
    assert changes_asked(path) == []


def test_a_job_past_its_time_limit_is_requeued(folder: Path, programs: Programs) -> None:
    path = programs(scontrol=scontrol("COMPLETING", reason="TimeLimit"))
    assert requeue_first_attempt(folder, progressed("failed") | {"rank": None})["status"] == "time_limit"
    assert changes_asked(path) == ["requeue 7"]


def test_a_failure_stays_a_failure_if_the_job_is_cancelled(folder: Path, programs: Programs) -> None:
    programs(scontrol=scontrol("COMPLETING"))
    verdict = requeue_first_attempt(folder, ended("nccl"))
    assert (verdict["status"], verdict["requeued"]) == ("nccl", False)


def test_a_refused_requeue_is_reported(folder: Path, programs: Programs) -> None:
    programs(scontrol=f'case "$1" in requeue) echo "Requeue is disabled" >&2; exit 1;; esac\n{scontrol()}')
    verdict = requeue_first_attempt(folder, progressed("preempted"))
    assert not verdict["requeued"]
    assert "(Requeue is disabled); to continue: muster resume RUN" in verdict["next"]


def test_a_node_without_scontrol_is_reported(folder: Path, programs: Programs) -> None:
    programs()
    verdict = requeue_first_attempt(folder, progressed("preempted"))
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
    assert changes_asked(path) == ["requeue 7"]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_rank_0_leaves_the_verdict_to_the_batch_script(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    programs(scontrol=scontrol(state))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempt.finish_for_killed_script(folder, 1, 4, max_restarts=3)
    assert not folder.exists()


def test_rank_0_does_nothing_outside_slurm(folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs()
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    attempt.finish_for_killed_script(folder, 1, 4, max_restarts=3)
    assert not folder.exists()


@pytest.mark.site(
    case="The controller does not answer when a preempted training asks to be requeued",
    before="the training ended for good after the first error, although it had saved its work",
    after="it asks again for as long as the job lives",
)
@pytest.mark.parametrize(
    "text", ["Unable to contact slurm controller (connect failure)", "Socket timed out on send/recv operation"]
)
def test_requeue_waits_for_a_busy_controller(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setattr(slurm_command, "LONGEST_PAUSE_S", 0.01)
    away = f'read -r n < "{tmp_path}/n"; [ "$n" -gt 9 ] || {{ echo $((n + 1)) > "{tmp_path}/n"; echo "{text}" >&2; exit 1; }}'
    (tmp_path / "n").write_text("0\n")
    path = programs(scontrol=f"{away}\n{scontrol()}")
    assert requeue_first_attempt(folder, progressed("preempted"))["requeued"]
    assert changes_asked(path) == ["requeue 7"]


def test_a_job_that_does_not_start_again_waits_less(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "WAIT_S", 0.2)
    programs(scontrol='echo "Socket timed out on send/recv operation" >&2; exit 1')
    verdict = requeue_first_attempt(folder, ended("user_error"))
    assert (verdict["status"], verdict["requeued"]) == ("user_error", False)


def test_a_requeue_without_an_answer_may_have_been_done(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(slurm_command, "LONGEST_PAUSE_S", 0.01)
    done = tmp_path / "done"
    programs(
        scontrol=f"""case "$1" in requeue) if [ -e "{done}" ]; then echo "Job is pending execution" >&2; exit 1; fi
        : > "{done}"; echo "Socket timed out on send/recv operation" >&2; exit 1;; esac
        if [ -e "{done}" ]; then {scontrol("PENDING", restarts=1)}; else {scontrol()}; fi"""
    )
    assert requeue_first_attempt(folder, progressed("preempted"))["requeued"]


def test_slurm_requeues_a_preempted_job_itself_where_it_does(folder: Path, programs: Programs) -> None:
    job = scontrol() + '; case "$*" in *"show job"*) echo "PreemptTime=2026-11-29T10:00:00 Requeue=1 Partition=gpu";; '
    job += '--version) echo "slurm 24.11.5";; *config) echo "PreemptType = preempt/partition_prio";; '
    path = programs(scontrol=job + '*partition*) echo "PreemptMode=REQUEUE";; esac')
    verdict = requeue_first_attempt(folder, progressed("preempted"))
    assert (verdict["requeued"], "Slurm requeues the job that it preempts" in verdict["next"]) == (True, True)
    assert not [call for call in changes_asked(path) if call.startswith("requeue")]
