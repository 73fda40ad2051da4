"""launcher/supervise/attempt.py: every attempt gets its own number, MASTER_PORT is reserved, and the verdict is right."""

import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conf.files import read_json, write_json
from launcher.run_folder import attempts
from launcher.supervise import attempt
from launcher.supervise.rendezvous import first_port, own_address, reserve_port
from tests.conftest import ROOT, Programs, module

BEGIN = [sys.executable, "-m", "launcher.supervise.attempt", "begin"]


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of Slurm, so that these tests also pass inside a job."""
    for name in (
        "SLURM_JOB_ID",
        "SLURM_JOB_NODELIST",
        "SLURM_RESTART_COUNT",
        "SUBMITIT_EXECUTOR",
        "MUSTER_CONFIG",
        "SLURMD_NODENAME",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder in a run, with its first attempt opened."""
    (tmp_path / "jobs/train/attempt-1").mkdir(parents=True)
    return tmp_path / "jobs/train"


def record_rank(folder: Path, rank: int, status: str, reason: str = "", after_s: float = 0) -> None:
    """Write the record of a rank's end, `after_s` seconds after the first."""
    attempt.record_end(folder, 1, rank, status, reason)
    path = folder / f"attempt-1/rank-{rank}.json"
    write_json(path, read_json(path) | {"time": 1000.0 + after_s, "host": f"n{rank}"})


def finish(folder: Path, code: int = 1, world_size: int = 4) -> dict[str, Any]:
    return attempt.finish(folder, 1, code, world_size)


def test_attempts_are_numbered_in_turn(tmp_path: Path) -> None:
    numbers = [attempt.begin(tmp_path / "train")[0]["MUSTER_ATTEMPT"] for _ in range(3)]
    assert numbers == ["1", "2", "3"]


def test_attempts_that_begin_at_the_same_time_get_different_numbers(
    tmp_path: Path, surroundings: dict[str, str]
) -> None:
    command = [*BEGIN, str(tmp_path / "train")]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    outputs = [process.communicate(timeout=30)[0].split() for process in processes]
    assert sorted(lines[0] for lines in outputs) == [f"MUSTER_ATTEMPT={number}" for number in range(1, 9)]
    assert {lines[1] for lines in outputs} == {"ready"}


def test_an_attempt_records_where_and_for_which_config_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("MUSTER_CONFIG", "0123456789abcdef")
    monkeypatch.setenv("MUSTER_GPUS", "8")
    before = time.time()
    attempt.begin(tmp_path / "train")
    opened = read_json(tmp_path / "train/attempt-1/begin.json")
    assert opened.pop("started") >= before
    assert opened == {
        "host": socket.gethostname(),
        "job_id": "4711",
        "config": "0123456789abcdef",
        "gpus": 8,
        "resumed": None,
    }


def test_the_port_comes_from_the_job_id_and_the_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    values, reservation = attempt.begin(tmp_path / "train", port=0)
    assert reservation
    with reservation:
        assert reservation.getsockname()[1] == int(values["MASTER_PORT"])
        assert 0 <= int(values["MASTER_PORT"]) - first_port(4711, 2) < 16
    assert values["MASTER_ADDR"] == "127.0.0.1"


def test_a_job_without_a_rendezvous_reserves_no_port(tmp_path: Path) -> None:
    values, reservation = attempt.begin(tmp_path / "train")
    assert (values, reservation) == ({"MUSTER_ATTEMPT": "1"}, None)


def test_completed_needs_a_record_of_rank_0(folder: Path) -> None:
    record_rank(folder, 0, "completed")
    verdict = finish(folder, code=0)
    assert (verdict["status"], verdict["rank"], verdict["exit"], verdict["attempt"]) == ("completed", 0, 0, 1)
    assert read_json(folder / "attempt-1.json") == verdict


@pytest.mark.parametrize(
    ("records", "code", "status", "rank", "reason"),
    [
        ([(2, "failed", "loss is nan")], 1, "failed", 2, "loss is nan"),
        ([(3, "user_error", "data.path: no such file")], 2, "user_error", 3, "data.path"),
        ([(1, "out_of_memory", "CUDA out of memory"), (0, "nccl", "NCCL timeout")], 1, "out_of_memory", 1, "CUDA out"),
        ([(0, "failed", "Connection closed by peer [10.0.0.1]"), (3, "failed", "nan")], 1, "failed", 3, "nan"),
        ([(0, "nccl", "Connection reset by peer"), (1, "failed", "nan")], 1, "failed", 1, "nan"),
        ([(0, "failed", "Broken pipe"), (1, "nccl", "Socket Timeout"), (2, "failed", "nan")], 1, "failed", 2, "nan"),
        ([(2, "failed", "recv failed"), (0, "failed", "Broken pipe")], 1, "failed", 2, "recv failed"),
        ([(0, "completed", ""), (1, "failed", "nan")], 0, "failed", 1, "nan"),
        ([(0, "preempted", "saved at step 7"), (1, "failed", "nan")], 1, "failed", 1, "nan"),
        ([(0, "preempted", "saved at step 7")], 1, "preempted", 0, "saved at step 7"),
        ([(rank, "preempted", "saved at step 7") for rank in range(4)], 143, "preempted", 0, "saved at step 7"),
        ([(0, "completed", "")], 137, "failed", None, "srun exited with 137"),
        ([], 0, "failed", None, "none of 4 ranks"),
        ([], 137, "failed", None, "exit code 137"),
        ([(1, "preempted", "saved at step 7")], 9, "preempted", 1, "saved at step 7"),  # it stopped after all had saved
    ],
    ids=[
        "one rank failed",
        "an error of the user",
        "the first failure is the cause",
        "a closed connection is not the cause",
        "a reset connection is not the cause",
        "lost connections are not the cause",
        "the first lost connection if there is nothing else",
        "a rank failed although rank 0 completed",
        "a failure outweighs preemption",
        "preempted",
        "all preempted",
        "killed while exiting",
        "srun exits with 0 though nothing ran",
        "killed without a record",
        "no record of rank 0",
    ],
)
def test_the_verdict_names_the_cause(
    folder: Path, records: list[tuple[int, str, str]], code: int, status: str, rank: int | None, reason: str
) -> None:
    for order, (failed_rank, rank_status, rank_reason) in enumerate(records):
        record_rank(folder, failed_rank, rank_status, rank_reason, after_s=order)
    verdict = finish(folder, code=code)
    assert (verdict["status"], verdict["rank"], verdict["exit"]) == (status, rank, code)
    assert reason in verdict["reason"]
    assert verdict["host"] == (socket.gethostname() if rank is None else f"n{rank}")


def test_the_verdict_has_the_traceback_of_the_cause(folder: Path) -> None:
    attempt.record_end(folder, 1, 3, "failed", "KeyError: 'a'", "Traceback: the whole of it")
    assert finish(folder)["error"] == "Traceback: the whole of it"


@pytest.mark.parametrize(
    ("job", "text", "step"),
    [
        ("train", '{"step": 1}\n{"step": 2, "loss": 3.5}\n', 2),
        ("train", '{"step": 1}\n{"step": 2, "lo', 1),
        ("train", '{"step": 1}\n{"eval_loss": 3.5}\n', 1),
        ("train", "", None),
        ("train", None, None),
        ("evaluate", '{"step": 1}\n', None),
    ],
    ids=["last line", "half a line", "a line without", "empty", "absent", "another job"],
)
def test_the_verdict_has_the_last_training_step(tmp_path: Path, job: str, text: str | None, step: int | None) -> None:
    (tmp_path / "jobs" / job / "attempt-1").mkdir(parents=True)
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert finish(tmp_path / "jobs" / job)["step"] == step


def test_half_written_files_are_ignored(folder: Path) -> None:
    (folder / "attempt-1/.rank-0.json.k2j3").write_text('{"status": "comp')
    (folder / ".attempt-1.json.x8s7").write_text('{"status": "comp')
    assert attempts.last_verdict(folder) is None
    assert "none of 4 ranks" in finish(folder, code=0)["reason"]


def test_the_last_verdict_is_that_of_the_newest_attempt(tmp_path: Path) -> None:
    for number in range(1, 12):
        attempt.begin(tmp_path)
        attempt.record_end(tmp_path, number, 0, "failed", f"attempt {number}")
        attempt.finish(tmp_path, number, 1, 1)
    verdict = attempts.last_verdict(tmp_path)
    assert verdict
    assert verdict["reason"] == "attempt 11"


def test_there_is_no_last_verdict_while_the_newest_attempt_has_none(folder: Path) -> None:
    finish(folder)
    assert attempts.last_verdict(folder)
    attempt.begin(folder)
    assert attempts.last_verdict(folder) is None


def test_there_is_no_last_verdict_without_attempts(tmp_path: Path) -> None:
    assert attempts.last_verdict(tmp_path) is None
    assert attempts.last_verdict(tmp_path / "nowhere") is None


def exports(process: "subprocess.Popen[str]") -> dict[str, str]:
    """Return the variables that `begin` prints before `ready`. It may then run on, to keep the port reserved."""
    assert process.stdout
    lines = [line.rstrip("\n") for line in iter(process.stdout.readline, "ready\n") if line or pytest.fail("not ready")]
    return dict(line.split("=", 1) for line in lines)


@contextmanager
def begin_process(folder: Path, *words: str, env: dict[str, str]) -> Iterator[dict[str, str]]:
    """Run `begin` during the block, as the batch script does. Yields the variables that it prints."""
    pipe = subprocess.PIPE
    command = [*BEGIN, str(folder), *words]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield exports(process)
        finally:
            process.terminate()


def test_begin_prints_the_variables_and_reserves_the_port(tmp_path: Path, surroundings: dict[str, str]) -> None:
    with begin_process(tmp_path / "train", "--port", "0", env=surroundings) as values:
        assert list(values) == ["MUSTER_ATTEMPT", "MASTER_ADDR", "MASTER_PORT"]
        with pytest.raises(OSError, match="in use"):
            reserve_port(int(values["MASTER_PORT"]), only=True)
    reserve_port(int(values["MASTER_PORT"]), only=True).close()


def test_begin_releases_the_port_when_the_batch_script_is_killed(tmp_path: Path, surroundings: dict[str, str]) -> None:
    script = f"{sys.executable} -m launcher.supervise.attempt begin {tmp_path}/train --port 0 & wait"
    command = ["/bin/sh", "-c", script]
    with subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        port = int(exports(process)["MASTER_PORT"])
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            return reserve_port(port, only=True).close()
        except OSError:
            assert time.monotonic() < deadline, f"port {port} is still reserved"
            time.sleep(0.05)


def test_a_disk_that_is_full_at_the_start_is_named(tmp_path: Path, surroundings: dict[str, str]) -> None:
    """No byte can be written, as on a full disk: neither the beginning of an attempt nor its verdict."""

    def no_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    command = [sys.executable, "-m", "launcher.supervise.attempt", "begin", tmp_path / "train"]
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings, capture_output=True, text=True, preexec_fn=no_bytes, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"muster: {tmp_path}/train: cannot be written: [Errno 27] File too large\n"


def test_a_port_in_use_gives_a_verdict(tmp_path: Path, surroundings: dict[str, str]) -> None:
    with reserve_port(21_000) as reservation:
        port = reservation.getsockname()[1]
        done = module("launcher.supervise.attempt", "begin", tmp_path / "train", "--port", port, env=surroundings)
    verdict = attempts.last_verdict(tmp_path / "train")
    assert (done.returncode, done.stdout) == (2, "")
    assert verdict
    assert verdict["status"] == "user_error"
    for text in (verdict["reason"], done.stderr):
        assert f"cluster.network.master_port={port}" in text
        assert "master_port=null" in text
        assert "Traceback" not in text


def test_begin_in_a_folder_that_cannot_be_created_prints_no_traceback(surroundings: dict[str, str]) -> None:
    done = module("launcher.supervise.attempt", "begin", "/dev/null/train", "--port", 0, env=surroundings)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("nodes", "scontrol", "address"),
    [
        ("192.0.2.[7-8]", "exit 1", "192.0.2.7"),
        ("a.invalid", 'echo "NodeAddr=10.9.8.7 x"', "10.9.8.7"),
        ("a.invalid", "echo no address", own_address("192.0.2.1") or "a.invalid"),
        ("a.invalid", "exit 1", own_address("192.0.2.1") or "a.invalid"),
    ],
    ids=["the first host", "its NodeAddr if the name does not resolve", "its own if there is nothing better", "no answer"],
)  # fmt: skip
def test_master_addr_is_the_first_host(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, nodes: str, scontrol: str, address: str
) -> None:
    programs(scontrol=scontrol)
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    values, reservation = attempt.begin(tmp_path / "train", port=0)
    assert reservation
    reservation.close()
    assert values["MASTER_ADDR"] == address


def test_an_invalid_nodelist_gives_a_verdict(tmp_path: Path, programs: Programs) -> None:
    path = programs()
    env = {"PATH": str(path), "SLURM_JOB_NODELIST": "n[1-"}
    done = module("launcher.supervise.attempt", "begin", tmp_path / "train", "--port", 0, env=env)
    verdict = attempts.last_verdict(tmp_path / "train")
    assert done.returncode == 2
    assert verdict
    assert (verdict["status"], "not a list of nodes" in verdict["reason"]) == ("failed", True)


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("failed", 1), ("preempted", 1)])
def test_finish_exits_with_0_only_for_a_completed_attempt(
    folder: Path, surroundings: dict[str, str], status: str, code: int
) -> None:
    record_rank(folder, 0, status, "because")
    env = surroundings | {"MUSTER_ATTEMPT": "1"}
    done = module("launcher.supervise.attempt", "finish", folder, "--code", 0, "--world-size", 4, env=env)
    assert (done.returncode, done.stdout) == (code, f"muster: train {status} because\n")
    assert json.loads((folder / "attempt-1.json").read_text())["status"] == status


def test_the_verdict_names_the_first_and_the_last_checkpoint(folder: Path) -> None:
    for step in (3, 12):
        (folder.parents[1] / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (folder.parents[1] / "checkpoints/.step-00000020.partial").mkdir()
    number = attempt.begin(folder)[0]["MUSTER_ATTEMPT"]
    (folder.parents[1] / "checkpoints/step-00000015").mkdir()
    verdict = attempt.finish(folder, int(number), 1, 4)
    assert (verdict["resumed"], verdict["saved"]) == (12, 15)


def test_leftovers_of_an_earlier_attempt_are_removed(folder: Path) -> None:
    for name in ("stop", "save", "7_0_result.pkl.save_tmp"):
        (folder / name).touch()
    attempt.begin(folder)
    assert not (folder / "stop").exists()
    assert not (folder / "save").exists()
    assert not (folder / "7_0_result.pkl.save_tmp").exists()


@pytest.mark.parametrize(("then", "status"), [("7", "failed"), ("8", None)], ids=["requeued", "another submission"])
def test_an_attempt_that_slurm_ended_without_a_verdict_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, status: str | None
) -> None:
    for job_id in ("7", then):
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        attempt.begin(tmp_path / "train")
    first = read_json(tmp_path / "train/attempt-1.json")
    assert (first and first["status"]) == status
    if first:
        assert (first["requeued"], first["attempt"], first["job_id"]) == (True, 1, "7")
        assert attempts.verdicts(tmp_path / "train") == [first]


@pytest.mark.parametrize(
    ("left", "before_s", "expected_s"),
    [("10:00", 120, 480), ("1:00", 120, 30), ("UNLIMITED", 120, None)],
    ids=["before the limit", "not before half of it", "no limit"],
)
def test_begin_prints_the_time_at_which_to_stop(
    tmp_path: Path, surroundings: dict[str, str], programs: Programs, left: str, before_s: int, expected_s: int | None
) -> None:
    programs(squeue=f"echo {left}")
    env = surroundings | {"SLURM_JOB_ID": "7"}
    done = module("launcher.supervise.attempt", "begin", tmp_path / "train", "--stop-before", before_s, env=env)
    values = dict(line.split("=", 1) for line in done.stdout.split() if "=" in line)
    assert (done.returncode, "MUSTER_STOP_AT" in values) == (0, expected_s is not None)
    if expected_s is not None:
        assert float(values["MUSTER_STOP_AT"]) == pytest.approx(time.time() + expected_s, abs=5)


def test_a_job_on_slurm_is_requeued_by_finish(folder: Path, surroundings: dict[str, str], programs: Programs) -> None:
    path = programs(scontrol='case "$*" in *show*) echo "JobState=RUNNING Restarts=0";; esac')
    record_rank(folder, 0, "preempted", "saved at step 7")
    env = surroundings | {"MUSTER_ATTEMPT": "1", "SLURM_JOB_ID": "7"}
    words = ("--code", 3, "--world-size", 4, "--max-restarts", 3)
    done = module("launcher.supervise.attempt", "finish", folder, *words, env=env)
    assert (done.returncode, done.stdout) == (
        1,
        "muster: train preempted saved at step 7; continues from its checkpoint\n",
    )
    assert "requeue" in (path / "scontrol.calls").read_text()


def test_a_job_outside_slurm_is_never_requeued(folder: Path, surroundings: dict[str, str], programs: Programs) -> None:
    path = programs(scontrol="exit 0")
    record_rank(folder, 0, "preempted", "saved at step 7")
    module(
        "launcher.supervise.attempt", "finish", folder, "--max-restarts", 3, env=surroundings | {"MUSTER_ATTEMPT": "1"}
    )
    assert not (path / "scontrol.calls").exists()
