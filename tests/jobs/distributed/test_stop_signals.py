"""jobs/distributed/stop_signals.py: a signal, the clock and the stop file all set the same flag."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.errors import Stopped
from jobs.distributed import stop_signals
from jobs.distributed.stop_signals import StopFlag

ROOT = Path(__file__).resolve().parents[3]


def test_without_a_request_the_flag_is_not_set() -> None:
    assert not StopFlag().requested()
    assert not StopFlag(stop_at=time.time() + 60).requested()


@pytest.mark.parametrize(
    ("seconds_to_limit", "status"),
    [(None, "preempted"), (3600, "preempted"), (60, "time_limit"), (0, "time_limit")],
    ids=["no limit", "long before", "a minute early", "in time"],
)
def test_a_signal_close_to_the_time_limit_means_the_time_limit(seconds_to_limit, status) -> None:
    stop = StopFlag(None if seconds_to_limit is None else time.time() + seconds_to_limit)
    stop.set(signal.SIGUSR2)
    assert stop.requested()
    assert stop.request == (status, "told to stop by SIGUSR2")


def test_the_clock_alone_sets_the_flag() -> None:
    stop = StopFlag(time.time() - 1)
    assert stop.requested()
    assert stop.request[0] == "time_limit"


def test_the_stop_file_is_checked_every_few_seconds(tmp_path, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now)
    stop = StopFlag()
    stop.file = tmp_path / "stop"
    assert not stop.requested()
    stop.file.touch()
    now += stop_signals.FILE_CHECK_S - 0.1
    assert not stop.requested()
    now += 0.2
    assert stop.requested()
    assert stop.request[0] == "stopped"


def test_a_request_to_save_is_answered_once(tmp_path, monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now)
    stop = StopFlag()
    assert not stop.save_requested(), "only rank 0 has a file"
    stop.save_file = tmp_path / "save"
    stop.save_file.touch()
    assert stop.save_requested()
    now += stop_signals.FILE_CHECK_S
    assert not stop.save_requested()
    stop.save_file.touch()
    assert not stop.save_requested(), "it was looked for just before"
    now += stop_signals.FILE_CHECK_S
    assert stop.save_requested()
    assert not stop.requested()


def test_the_first_request_stays() -> None:
    stop = StopFlag()
    stop.set(signal.SIGUSR1)
    assert stop.requested()
    stop.stop_at = 0.0
    assert stop.request[0] == "preempted"


@pytest.mark.parametrize(("step", "expected"), [(7, "saved at step 7 of 9"), (0, "nothing to save yet")])
def test_the_error_names_the_saved_step(step, expected) -> None:
    with pytest.raises(Stopped, match=f"because; {expected}") as caught:
        StopFlag().raise_stopped(("stopped", "because"), step, 9)
    assert caught.value.status == "stopped"


@pytest.mark.parametrize("rank", [0, 1])
def test_training_watches_signals_clock_and_file(monkeypatch, tmp_path, rank) -> None:
    monkeypatch.setenv("MUSTER_STOP_AT", "4000000000")
    monkeypatch.setenv("RANK", str(rank))
    config = type("Config", (), {"run_dir": str(tmp_path)})
    before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    for number in stop_signals.SIGNALS:
        with stop_signals.watch(config) as stop:
            assert stop.stop_at == 4e9
            assert (stop.file == tmp_path / "jobs/train/stop") is (rank == 0)
            os.kill(os.getpid(), number)
            assert stop.requested()
    assert {number: signal.getsignal(number) for number in stop_signals.SIGNALS} == before


def test_a_signal_during_start_up_is_not_lost(tmp_path) -> None:
    stop = stop_signals.install_handlers()
    os.kill(os.getpid(), signal.SIGUSR2)
    with stop_signals.watch(type("Config", (), {"run_dir": str(tmp_path)})) as watched:
        assert watched is stop
        assert watched.requested()
    for number in stop_signals.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


LEAVES = """
import multiprocessing, os, signal, sys, time
from jobs.distributed import stop_signals
stop_signals.install_handlers()
if sys.argv[1] == "before":
    os.kill(os.getpid(), signal.SIGTERM)
stop_signals.exit_on_signal(lambda status, reason: print(status, reason))
if sys.argv[1] == "pool":
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os.kill(os.getpid(), signal.SIGUSR2)
print("went on")
"""


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("after", "preempted told to stop by SIGUSR2\n"),
        ("before", "preempted told to stop by SIGTERM\n"),
        ("pool", "child 3\npreempted told to stop by SIGUSR2\n"),
    ],
)
def test_a_job_with_nothing_to_save_leaves_at_once(when, expected) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES, when], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (3, expected, "")
