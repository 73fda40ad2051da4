"""jobs/distributed/heartbeat.py in real ranks over Gloo: the rank that does not join a collective, or is stopped, is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.files import read_json
from jobs.distributed import heartbeat
from tests.jobs import ranks

CLONE = Path(__file__).resolve().parents[3]


def _hangs(rank: int, local: str, attempt: str, does: str) -> None:
    import torch
    import torch.distributed as dist

    from jobs.distributed.process_group import all_reduce_sum

    heartbeat.start(Path(local), rank, "n1")
    if rank == 0:
        words = ["--node", "0", "--here", "3", "--world", "3", "--start", "60", "--step", "2", "--save", "60"]
        subprocess.Popen([sys.executable, "-m", "launcher.supervise.watchdog", local, attempt, *words], cwd=CLONE)
    dist.init_process_group("gloo")
    for step in range(1, 5):
        heartbeat.beat("train", step)
        if step == 3 and rank == 1:
            _hang(does)
        all_reduce_sum(torch.ones(1))


def _hang(does: str) -> None:
    if does == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(
    ("does", "said"), [("stops", "process stopped (T)"), ("sleeps", "at tests/jobs/distributed/test_heartbeat.py:")]
)
def test_a_collective_that_one_rank_does_not_join_is_named(tmp_path, does, said) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "attempt-1").mkdir()
    with pytest.raises(Exception, match="SIGKILL"):
        ranks.spawn(_hangs, 3, str(tmp_path / "local"), str(tmp_path / "attempt-1"), does)
    found = read_json(tmp_path / "attempt-1/hang.json")
    others = "; the others wait in all_reduce (jobs/distributed/process_group.py:"
    assert found["reason"].startswith(f"rank 1 on n1 hangs: step 3, phase train, {said}")
    assert others in found["reason"]
    assert "total" in found["reason"].partition(others)[2]


def test_a_heartbeat_is_overwritten_in_place_and_deleted_with_the_rank(tmp_path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    heartbeat.beat("train", 1)  # before `start` nothing is written
    heartbeat.start(local, 5, "n3")
    sizes = set()
    for step in (9, 10**9):
        heartbeat.beat("train", step)
        sizes.add((local / "rank-5.beat").stat().st_size)
    found = read_json(local / "rank-5.beat")
    assert (found["rank"], found["host"], found["pid"], found["step"], found["count"]) == (
        5,
        "n3",
        os.getpid(),
        10**9,
        3,
    )
    assert sizes == {heartbeat.BYTES}
    heartbeat.beat("save")
    assert read_json(local / "rank-5.beat")["step"] == 10**9
    heartbeat.close()
    assert not local.exists()
    os.kill(os.getpid(), heartbeat.STACKS_SIGNAL)  # STACKS_SIGNAL after `close` ends nothing
    signal.signal(heartbeat.STACKS_SIGNAL, signal.SIG_DFL)


def test_a_rank_asked_for_its_stacks_goes_on(tmp_path) -> None:
    heartbeat.start(tmp_path, 0)
    os.kill(os.getpid(), heartbeat.STACKS_SIGNAL)
    assert "test_a_rank_asked_for_its_stacks_goes_on" in (tmp_path / "rank-0.stack").read_text()
    heartbeat.close()
    signal.signal(heartbeat.STACKS_SIGNAL, signal.SIG_DFL)
