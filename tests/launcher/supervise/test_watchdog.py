"""launcher/supervise/watchdog.py on real processes: ranks that stop, sleep, never start or work; the verdict and the kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.files import read_json
from launcher.run_folder import attempts
from launcher.supervise import watchdog
from tests.conftest import ROOT

RANK = """
import os, signal, sys, time
from pathlib import Path
from jobs.distributed import heartbeat

def wait_for_others():
    time.sleep(100)

rank, does = int(sys.argv[2]), sys.argv[3]
heartbeat.start(Path(sys.argv[1]), rank, f"n{rank + 1}")
heartbeat.beat("load")
heartbeat.beat("train", 1)
if does == "ends":
    heartbeat.close()
elif does == "fails":
    raise SystemExit(1)
elif does == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
elif does == "sleeps":
    time.sleep(100)
elif does == "works":
    for step in range(2, 1000):
        heartbeat.beat("train", step)
        time.sleep(0.2)
elif does == "reads":
    while True:
        heartbeat.refresh()
        time.sleep(0.2)
elif does == "saves":
    heartbeat.beat("save", 1)
    wait_for_others()
else:
    heartbeat.beat("train", 2)
    wait_for_others()
"""
StartNode = Callable[..., list["subprocess.Popen[bytes]"]]


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    (tmp_path / "attempt-1").mkdir()
    return tmp_path / "attempt-1"


@pytest.fixture
def test_processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """The processes of a test. All are killed at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def start_node(attempt: Path, test_processes: list["subprocess.Popen[bytes]"]) -> StartNode:
    """`start_node(0, "waits", "stops", world=2, step=1.5)`: start a node's watchdog and ranks that do this."""

    def start(number: int, *does: str, world: int, first: int = 0, here: int | None = None, **limits: float) -> Any:
        local = attempt.parent / f"local-{number}"
        local.mkdir()
        words = ["--node", number, "--here", here or len(does), "--world", world]
        for name in ("start", "step", "save"):
            words += [f"--{name}", limits.get(name, 60)]
        ranks = [python("-c", RANK, local, first + rank, what) for rank, what in enumerate(does)]
        until(lambda: len(list(local.glob("*.beat"))) == len(does) or any(rank.poll() is not None for rank in ranks))
        return [python("-m", "launcher.supervise.watchdog", local, attempt, *words), *ranks]

    def python(*words: object) -> "subprocess.Popen[bytes]":
        test_processes.append(subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT))
        return test_processes[-1]

    return start


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def verdict_after_kill(attempt: Path, processes: list["subprocess.Popen[bytes]"]) -> dict[str, Any]:
    """Return the verdict once all processes have ended. Checks that the ranks were killed by SIGKILL."""
    codes = [process.wait(40) for process in processes]
    assert codes == [0, *[-signal.SIGKILL] * (len(codes) - 1)]
    assert not list(attempt.parent.glob("local-*"))
    verdict: dict[str, Any] = read_json(attempt / "hang.json")
    return verdict


def test_a_stopped_rank_is_named_and_all_are_killed(attempt: Path, start_node: StartNode) -> None:
    verdict = verdict_after_kill(attempt, start_node(0, "waits", "stops", world=2, step=2))
    assert verdict["reason"].startswith(
        "rank 1 on n2 hangs: step 1, phase train, process stopped (T); rank 0 waits at "
    )
    assert (verdict["status"], verdict["rank"], verdict["host"], verdict["error"]) == ("hang", 1, "n2", "")
    assert "wait_for_others" in (attempt / "rank-0.stack").read_text()


def test_a_rank_that_sleeps_is_named_with_its_stack(attempt: Path, start_node: StartNode) -> None:
    verdict = verdict_after_kill(attempt, start_node(0, "waits", "sleeps", "waits", world=3, step=2))
    assert verdict["rank"] == 1
    assert "phase train, at <string>:" in verdict["reason"]
    assert "most recent call first" in verdict["error"]


@pytest.mark.proof
def test_a_rank_without_any_heartbeat_is_named(attempt: Path, start_node: StartNode) -> None:
    verdict = verdict_after_kill(attempt, start_node(0, "works", world=2, here=2, start=2))
    assert verdict["rank"] == 1
    assert "no heartbeat ever came" in verdict["reason"]


def test_a_phase_has_its_own_limit(attempt: Path, start_node: StartNode) -> None:
    began = time.monotonic()
    verdict = verdict_after_kill(attempt, start_node(0, "saves", world=1, step=1, save=4))
    assert time.monotonic() - began > 4
    assert "step 1, phase save, at" in verdict["reason"]


@pytest.mark.proof
def test_two_nodes_write_one_verdict(attempt: Path, start_node: StartNode) -> None:
    nodes = [start_node(number, what, world=2, first=number, step=2) for number, what in enumerate(("waits", "stops"))]
    for processes in nodes:
        assert [process.wait(60) for process in processes] == [0, -signal.SIGKILL]
    verdict = read_json(attempt / "hang.json")
    assert verdict["reason"].startswith(
        "rank 1 on n2 hangs: step 1, phase train, process stopped (T); rank 0 waits at "
    )


@pytest.mark.proof
def test_a_silent_node_is_named_with_its_last_heartbeat(attempt: Path, start_node: StartNode) -> None:
    lost, *_ = start_node(1, "waits", world=2, first=1)
    until(lambda: attempts.published_ranks(attempt))
    lost.send_signal(signal.SIGSTOP)
    verdict = verdict_of_killed_rank(attempt, start_node(0, "waits", world=2, step=2))
    assert verdict["reason"].startswith(
        "rank 1 on n2 hangs: step 2, phase train, and the watchdog of its node does not answer"
    )


def verdict_of_killed_rank(attempt: Path, processes: list["subprocess.Popen[bytes]"]) -> dict[str, Any]:
    assert [process.wait(60) for process in processes] == [0, -signal.SIGKILL]
    verdict: dict[str, Any] = read_json(attempt / "hang.json")
    return verdict


@pytest.mark.parametrize("does", ["ends", "fails"])
def test_it_ends_with_its_ranks_without_a_verdict(attempt: Path, start_node: StartNode, does: str) -> None:
    for process in start_node(0, does, world=1, start=1, step=1):
        process.wait(20)
    assert not (attempt / "hang.json").exists()
    assert not list(attempt.parent.glob("local-*"))


def test_signals_for_the_ranks_do_not_end_it(attempt: Path, start_node: StartNode) -> None:
    dog, *ranks = start_node(0, "works", "reads", world=2, step=2)
    until(lambda: attempts.published_ranks(attempt))
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        dog.send_signal(number)
    time.sleep(3)  # past the limit: ranks that work are not killed, whether or not they reach another step
    assert [process.poll() for process in (dog, *ranks)] == [None] * 3
    assert attempts.published_ranks(attempt)[0]["phase"] == "train"


@pytest.mark.proof
def test_a_suspended_job_does_not_count_as_a_hang(attempt: Path, start_node: StartNode) -> None:
    processes = start_node(0, "works", world=1, step=3)
    until(lambda: attempts.published_ranks(attempt))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid, number)
        time.sleep(5 if number == signal.SIGSTOP else 1.5)
    assert [process.poll() for process in processes] == [None, None]
    assert not (attempt / watchdog.MARK).exists()


@pytest.mark.site(
    "A run's folder is deleted while it trains",
    "its ranks went on until the time limit, and put parts of the folder back",
    "they end within seconds, and nothing is restarted",
)
def test_the_ranks_of_a_run_that_was_deleted_are_ended(attempt: Path, start_node: StartNode) -> None:
    processes = start_node(0, "works", "works", world=2)
    until((attempt / "node-0.json").exists)
    (attempt / "node-0.json").unlink()
    attempt.rmdir()
    assert [process.wait(40) for process in processes] == [0, -signal.SIGKILL, -signal.SIGKILL]
    assert not attempt.exists()
