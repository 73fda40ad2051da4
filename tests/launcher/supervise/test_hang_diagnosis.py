"""launcher/supervise/hang_diagnosis.py: the line about a hang, from heartbeats, process states, stacks and flight records."""

import pickle
from typing import Any

import pytest

from launcher.supervise import hang_diagnosis

TORCH = "/venv/lib/python3.12/site-packages/torch"


def stack(*frames: str) -> str:
    """faulthandler's text of two threads; the frames are the main thread's, innermost first."""
    other = (
        'Thread 0x00007f1 (most recent call first):\n  File "/usr/lib/python3.12/threading.py", line 359 in wait\n\n'
    )
    return (
        other
        + "Current thread 0x00007f2 (most recent call first):\n"
        + "".join(f"  File {frame}\n" for frame in frames)
    )


REDUCE = stack(
    f'"{TORCH}/distributed/distributed_c10d.py", line 3190 in all_reduce',
    f'"{TORCH}/distributed/c10d_logger.py", line 83 in wrapper',
    '"/run/code/jobs/distributed/process_group.py", line 93 in total',
    '"/run/code/jobs/train.py", line 117 in _step',
)
ASLEEP = stack('"/run/code/jobs/data/batches.py", line 50 in batch', '"/run/code/jobs/train.py", line 104 in _step')
SYNC = stack('"/run/code/jobs/train.py", line 121 in _step')
AUTOGRAD = stack(
    f'"{TORCH}/autograd/graph.py", line 865 in _engine_run_backward', '"/run/code/jobs/b.py", line 9 in backward'
)
HOOK = (
    'Thread 0x00007f0 (most recent call first):\n  File "'
    + TORCH
    + '/distributed/fsdp/x.py", line 1 in reduce_scatter\n\n'
)


def rank(number: int, count: int = 40, text: str = REDUCE, **more: Any) -> dict[str, Any]:
    host = f"n{number // 2 + 1}"
    fields = {
        "rank": number,
        "host": host,
        "count": count,
        "step": 17,
        "phase": "train",
        "silent_s": 600.4,
        "state": "S",
    }
    return fields | {"stack": text, "flight": None, "answered": True} | more


def line(*ranks: dict[str, Any], world_size: int = 4) -> tuple[int | None, str]:
    result = hang_diagnosis.diagnose({item["rank"]: item for item in ranks}, world_size, "/run/code")
    return result["rank"], result["reason"].partition(" (silent")[0]


IN = "in all_reduce (jobs/distributed/process_group.py:93 total)"


def test_a_stopped_rank_is_named_with_the_collective_of_the_others() -> None:
    result = line(rank(0), rank(1), rank(2), rank(3, text="", state="T"))
    assert result == (3, f"rank 3 on n2 hangs: step 17, phase train, process stopped (T); the others wait {IN}")


def test_a_stopped_rank_outweighs_one_with_fewer_heartbeats() -> None:
    assert line(rank(0), rank(1), rank(2, count=39), rank(3, text="", state="T"))[0] == 3


def test_the_rank_with_the_fewest_heartbeats_is_named_with_its_place() -> None:
    result = line(rank(0), rank(1, count=39, text=ASLEEP), rank(2), rank(3))
    assert result == (
        1,
        f"rank 1 on n1 hangs: step 17, phase train, at jobs/data/batches.py:50 batch; the others wait {IN}",
    )


@pytest.mark.parametrize(
    "odd",
    [rank(1, text=ASLEEP), rank(1, text=""), rank(1, state="D")],
    ids=["not in a collective", "no stack", "in a system call"],
)
def test_of_ranks_with_equal_heartbeats_the_different_one_is_named(odd: dict[str, Any]) -> None:
    assert line(rank(0), odd, rank(2), rank(3))[0] == 1


def test_the_flight_recorder_decides_if_all_wait_for_the_gpu() -> None:
    waiting = [rank(number, text=SYNC, flight={"last": 300, "waits": "nccl:all_reduce"}) for number in range(3)]
    result = line(*waiting, rank(3, text=SYNC, flight={"last": 299, "waits": None}))
    others = "the others wait in nccl:all_reduce (jobs/train.py:121 _step)"
    assert result == (3, f"rank 3 on n2 hangs: step 17, phase train, at jobs/train.py:121 _step; {others}")


def test_a_collective_in_autograds_thread_counts() -> None:
    result = line(rank(0, text=HOOK + AUTOGRAD), rank(1, text=ASLEEP, count=39), world_size=2)
    assert result[1].endswith("; rank 0 waits in reduce_scatter (jobs/b.py:9 backward)")


def test_a_rank_that_waits_for_a_disk_is_named() -> None:
    disk = stack(
        '"/usr/lib/python3.12/os.py", line 7 in fsync',
        f'"{TORCH}/distributed/checkpoint/filesystem.py", line 400 in _write_files_from_queue',
        '"/run/code/jobs/backends/fsdp.py", line 110 in save',
    )
    result = line(rank(0), rank(1, text=disk, phase="save"), rank(2), rank(3))
    doing = "at jobs/backends/fsdp.py:110 save, inside fsync (os.py:7)"
    assert result == (1, f"rank 1 on n1 hangs: step 17, phase save, {doing}; the others wait {IN}")


def test_a_writing_thread_decides_if_all_wait_for_it() -> None:
    def saving(*frames: str) -> str:
        waits = stack(
            '"/usr/lib/python3.12/threading.py", line 1139 in join',
            '"/run/code/jobs/checkpoint/async_save.py", line 87 in settle',
        )
        thread = "".join(
            f"  File {frame}\n" for frame in (*frames, '"/run/code/jobs/backends/fsdp.py", line 120 in write')
        )
        return f"Thread 0x00007f0 (most recent call first):\n{thread}\n{waits}"

    gather = saving(f'"{TORCH}/distributed/distributed_c10d.py", line 1 in gather_object')
    disk = saving('"/usr/lib/python3.12/os.py", line 7 in fsync')
    result = line(rank(0, text=gather), rank(1, text=disk), rank(2, text=gather), rank(3, text=gather))
    doing = "at jobs/backends/fsdp.py:120 write, inside fsync (os.py:7)"
    others = "the others wait in gather_object (jobs/backends/fsdp.py:120 write)"
    assert result == (1, f"rank 1 on n1 hangs: step 17, phase train, {doing}; {others}")


def test_no_rank_is_named_if_none_is_behind() -> None:
    assert line(*(rank(number) for number in range(4))) == (
        None,
        f"all 4 ranks hang {IN}: step 17, phase train; none is behind",
    )


def test_a_single_rank_is_named() -> None:
    assert line(rank(0, text=ASLEEP), world_size=1) == (
        0,
        "rank 0 on n1 hangs: step 17, phase train, at jobs/data/batches.py:50 batch",
    )


def test_ranks_of_a_silent_node_are_named_together() -> None:
    result = line(rank(0), rank(1), rank(2, answered=False), rank(3, answered=False))
    doing = "and the watchdog of its node does not answer"
    assert result == (2, f"ranks 2, 3 hang, first rank 2 on n2: step 17, phase train, {doing}; the others wait {IN}")


def test_a_rank_without_any_heartbeat_is_named() -> None:
    assert line(rank(0), rank(1), rank(2)) == (
        3,
        f"rank 3 hangs: step 0, phase start, no heartbeat ever came; the others wait {IN}",
    )


@pytest.mark.parametrize("ranks", [[0], [0, 1]], ids=["one has never started", "all hang"])
def test_the_remedy_at_the_start_names_its_limit(ranks: list[int]) -> None:
    """The others wait for it in init_process_group."""
    started = {number: rank(number, count=1, phase="start") for number in ranks}
    remedy = hang_diagnosis.diagnose(started, 2, "/run/code")["remedy"]
    assert "start" in remedy and "raise cluster.network.nccl_timeout_s" in remedy


def test_a_rank_that_has_ended_is_not_named() -> None:
    assert line(rank(0, count=1, phase="ended"), rank(1, count=39, text=ASLEEP), rank(2), rank(3))[0] == 1


def test_others_in_different_places_are_counted() -> None:
    result = line(rank(0), rank(1), rank(2, text=ASLEEP), rank(3, text="", state="T"))
    assert result[1].endswith(f"process stopped (T); 2 of 3 others wait {IN}")


@pytest.mark.parametrize(
    ("phase", "key"),
    [("start", "nccl"), ("load", "nccl"), ("train", "step"), ("evaluate", "step"), ("save", "save")],
)
def test_the_limit_is_named(phase: str, key: str) -> None:
    result = hang_diagnosis.diagnose({0: rank(0, phase=phase, text=ASLEEP)}, 1, "/run/code")
    assert result["reason"].endswith(f"(silent for 600 s, cluster.network.{key}_timeout_s)")
    assert f"{key}_timeout_s" in result["remedy"]


def test_a_flight_record_is_read_without_running_code() -> None:
    states = [(7, "nccl:all_gather", "completed"), (8, "nccl:all_reduce", "started"), (9, "nccl:barrier", "scheduled")]
    entries = [{"record_id": number, "profiling_name": name, "state": state} for number, name, state in states]
    assert hang_diagnosis.read_flight_record(pickle.dumps({"entries": entries})) == {
        "last": 9,
        "waits": "nccl:all_reduce",
    }
    assert hang_diagnosis.read_flight_record(pickle.dumps({"entries": print})) is None
    assert hang_diagnosis.read_flight_record(b"half") is None
