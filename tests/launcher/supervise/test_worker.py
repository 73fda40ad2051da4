"""launcher/supervise/worker.py: what a rank sees and leaves behind, with a small `jobs` package in place of the real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf import resolve
from conf.files import read_json
from launcher.supervise import watchdog
from tests.conftest import ROOT, Compose, put

Rank = Callable[..., "subprocess.CompletedProcess[str]"]
JOBS = """
import json, os, sys
from conf.errors import DataError, Problem, Stopped
def run(name, config_path):
    print("JOB", name, config_path, json.dumps(dict(os.environ)))
    {body}
"""


@pytest.fixture
def rank(compose: Compose, tmp_path: Path, surroundings: dict[str, str]) -> Rank:
    """`rank(body, values, **environ)` runs a rank of `train` in a run whose job is `body`, as the batch script would."""

    def run(body: str, values: dict[str, Any] | None = None, **environ: str) -> "subprocess.CompletedProcess[str]":
        for package in ("conf", "launcher"):
            (tmp_path / "code").mkdir(exist_ok=True)
            (tmp_path / "code" / package).symlink_to(ROOT / package)
        (tmp_path / "code/jobs").mkdir()
        (tmp_path / "code/jobs/distributed").symlink_to(ROOT / "jobs/distributed")
        (tmp_path / "code/jobs/__init__.py").write_text(JOBS.format(body=body))
        config = put(compose("cluster=slurm", "model=llama8b"), {"run_dir": str(tmp_path)} | (values or {}))
        resolve.save(config, tmp_path / "config.yaml")
        given = {"PYTHONPATH": str(tmp_path / "code"), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "launcher.supervise.worker", "train", str(tmp_path / "config.yaml")]
        return subprocess.run(
            command, env=surroundings | given | environ, cwd="/", capture_output=True, text=True, timeout=30
        )

    return run


TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "127.0.0.1",
    "MUSTER_ATTEMPT": "2",
}


def seen(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """The environment that the job found."""
    [line] = [line for line in done.stdout.splitlines() if line.startswith("JOB ")]
    found: dict[str, str] = json.loads(line.split(" ", 3)[3])
    return found


def shown(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """The environment that the log shows."""
    [line] = [line for line in done.stdout.splitlines() if " INFO environment {" in line]
    found: dict[str, str] = json.loads(line.partition(" INFO environment ")[2])
    return found


def record(tmp_path: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = read_json(tmp_path / f"jobs/train/attempt-2/rank-{number}.json")
    return found


def test_a_rank_knows_where_it_stands(rank: Rank, tmp_path: Path) -> None:
    done = rank("pass", **TASK)
    found = seen(done)
    assert f"JOB train {tmp_path}/config.yaml" in done.stdout
    assert [found[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["3", "1", "4", "2"]
    assert found["GLOO_SOCKET_IFNAME"] == "lo"
    assert found["TRITON_CACHE_DIR"] == f"/tmp/muster-{os.getuid()}/triton"
    assert shown(done)["RANK"] == "3"


def test_only_rank_0_speaks_when_all_went_well(rank: Rank, tmp_path: Path) -> None:
    assert rank("pass", **TASK).returncode == 0
    assert not list(tmp_path.glob("jobs/train/attempt-2/rank-*.json"))


def test_rank_0_says_that_all_were_done(rank: Rank, tmp_path: Path) -> None:
    assert rank("pass", **TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).returncode == 0
    assert record(tmp_path, 0)["status"] == "completed"


@pytest.mark.parametrize(
    ("body", "code", "status", "reason", "traceback"),
    [
        ("raise DataError(Problem('data.path', 'a', 'no rows'))", 2, "user_error", "data.path=a: no rows", False),
        ("raise Stopped('preempted', 'saved at step 7')", 3, "preempted", "saved at step 7", False),
        ("raise ValueError('loss is nan')", 1, "failed", "ValueError: loss is nan", True),
        ("raise ValueError('first\\nsecond')", 1, "failed", "ValueError: first", True),
        ("raise MemoryError('no more')", 1, "out_of_memory", "MemoryError: no more", True),
        ("raise RuntimeError('NCCL error')", 1, "nccl", "RuntimeError: NCCL error", True),
        ("sys.exit(9)", 9, "failed", "SystemExit: 9", True),
    ],
    ids=["the user can mend it", "told to stop", "failed", "two lines", "out of memory", "nccl", "exit"],
)
def test_a_rank_says_how_it_ended(
    rank: Rank, tmp_path: Path, body: str, code: int, status: str, reason: str, traceback: bool
) -> None:
    done = rank(body, **TASK)
    found = record(tmp_path, 3)
    assert (done.returncode, found["status"], found["reason"], found["rank"]) == (code, status, reason, 3)
    assert (found["error"].startswith("Traceback")) is traceback
    assert ("Traceback" in done.stderr) is (traceback and "exit" not in body)


def test_secrets_reach_the_job_and_not_the_log(rank: Rank, tmp_path: Path, surroundings: dict[str, str]) -> None:
    (tmp_path / "secrets").write_text("NODE_KEY=from the file\n")
    values = {"cluster.secrets": ["NODE_KEY", "RANK_KEY"], "cluster.secrets_file": str(tmp_path / "secrets")}
    done = rank("pass", values, **TASK, RANK_KEY="from outside")
    assert (seen(done)["NODE_KEY"], seen(done)["RANK_KEY"]) == ("from the file", "from outside")
    assert not {"NODE_KEY", "RANK_KEY"} & set(shown(done))


def test_a_process_started_alone_is_rank_0_of_1(rank: Rank, tmp_path: Path) -> None:
    done = rank("pass")
    assert (seen(done)["RANK"], seen(done)["WORLD_SIZE"]) == ("0", "1")
    assert read_json(tmp_path / "jobs/train/attempt-1/rank-0.json")["status"] == "completed"


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_what_the_user_sets_wins_over_what_the_worker_finds(rank: Rank, name: str) -> None:
    values = {"cluster.environment": {name: "/mine"}}
    assert seen(rank("pass", values, **TASK, **{name: "/mine"}))[name] == "/mine"


def test_a_config_that_is_not_there_has_no_traceback(surroundings: dict[str, str]) -> None:
    command = [sys.executable, "-m", "launcher.supervise.worker", "train", "/nowhere/config.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=30)
    assert "/nowhere/config.yaml: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("name", ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])
def test_a_rank_at_work_is_watched(rank: Rank, tmp_path: Path, name: str) -> None:
    local = watchdog.heartbeat_folder(str(tmp_path), tmp_path / "jobs/train/attempt-2", 1)
    body = f"from pathlib import Path; print('BEAT', Path('{local}/rank-3.beat').read_text())"
    values = {"cluster.scratch": str(tmp_path), "cluster.network.save_timeout_s": 4000}
    done = rank(body, values, **TASK)
    expected = {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{local}/flight-", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "4120"}
    assert (done.returncode, seen(done)[name]) == (0, expected[name])
    assert '"phase": "start"' in done.stdout
    assert not local.exists()


def test_where_nothing_can_be_marked_the_job_runs_and_says_so(rank: Rank, tmp_path: Path) -> None:
    (tmp_path / "full").touch()
    done = rank("pass", {"cluster.scratch": f"{tmp_path}/full"}, **TASK)
    assert done.returncode == 0
    assert f"cluster.scratch={tmp_path}/full: no watchdog, so hangs are not detected" in done.stdout
