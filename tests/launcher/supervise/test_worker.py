"""launcher/supervise/worker.py: a rank's environment and record, with a small `jobs` package instead of the real one."""

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
    """`rank(body, values, **environ)` runs one rank of `train`, or of JOB, as the batch script does, with `body` as the job."""

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
        job = environ.pop("JOB", "train")
        command = [sys.executable, "-m", "launcher.supervise.worker", job, str(tmp_path / "config.yaml")]
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


def job_environment(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """Return the environment that the job got."""
    [line] = [line for line in done.stdout.splitlines() if line.startswith("JOB ")]
    values: dict[str, str] = json.loads(line.split(" ", 3)[3])
    return values


def logged_environment(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """Return the environment that the log shows."""
    [line] = [line for line in done.stdout.splitlines() if " INFO environment {" in line]
    values: dict[str, str] = json.loads(line.partition(" INFO environment ")[2])
    return values


def rank_record(tmp_path: Path, number: int) -> dict[str, Any]:
    values: dict[str, Any] = read_json(tmp_path / f"jobs/train/attempt-2/rank-{number}.json")
    return values


def test_a_rank_gets_its_variables(rank: Rank, tmp_path: Path) -> None:
    done = rank("pass", **TASK)
    values = job_environment(done)
    assert f"JOB train {tmp_path}/config.yaml" in done.stdout
    assert [values[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["3", "1", "4", "2"]
    assert values["GLOO_SOCKET_IFNAME"] == "lo"
    assert values["TRITON_CACHE_DIR"] == f"/tmp/muster-{os.getuid()}/triton"
    assert logged_environment(done)["RANK"] == "3"


def test_a_completed_rank_other_than_0_writes_no_record(rank: Rank, tmp_path: Path) -> None:
    assert rank("pass", **TASK).returncode == 0
    assert not list(tmp_path.glob("jobs/train/attempt-2/rank-*.json"))


def test_rank_0_records_completed(rank: Rank, tmp_path: Path) -> None:
    assert rank("pass", **TASK | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).returncode == 0
    assert rank_record(tmp_path, 0)["status"] == "completed"


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
    ids=["an error of the user", "stopped", "failed", "two lines", "out of memory", "nccl", "exit"],
)
def test_a_rank_records_how_it_ended(
    rank: Rank, tmp_path: Path, body: str, code: int, status: str, reason: str, traceback: bool
) -> None:
    done = rank(body, **TASK)
    values = rank_record(tmp_path, 3)
    assert (done.returncode, values["status"], values["reason"], values["rank"]) == (code, status, reason, 3)
    assert (values["error"].startswith("Traceback")) is traceback
    assert ("Traceback" in done.stderr) is (traceback and "exit" not in body)


def test_secrets_reach_the_job_but_not_the_log(rank: Rank, tmp_path: Path, surroundings: dict[str, str]) -> None:
    (tmp_path / "secrets").write_text("NODE_KEY=from the file\n")
    (tmp_path / "secrets").chmod(0o600)
    values = {"cluster.secrets": ["NODE_KEY", "RANK_KEY"], "cluster.secrets_file": str(tmp_path / "secrets")}
    done = rank("pass", values, **TASK, RANK_KEY="from outside")
    assert (job_environment(done)["NODE_KEY"], job_environment(done)["RANK_KEY"]) == ("from the file", "from outside")
    assert not {"NODE_KEY", "RANK_KEY"} & set(logged_environment(done))


def test_a_process_started_alone_is_rank_0_of_1(rank: Rank, tmp_path: Path) -> None:
    done = rank("pass")
    assert (job_environment(done)["RANK"], job_environment(done)["WORLD_SIZE"]) == ("0", "1")
    assert read_json(tmp_path / "jobs/train/attempt-1/rank-0.json")["status"] == "completed"


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_a_variable_of_the_user_wins(rank: Rank, name: str) -> None:
    values = {"cluster.environment": {name: "/mine"}}
    assert job_environment(rank("pass", values, **TASK, **{name: "/mine"}))[name] == "/mine"


def test_a_missing_config_gives_no_traceback(surroundings: dict[str, str]) -> None:
    command = [sys.executable, "-m", "launcher.supervise.worker", "train", "/nowhere/config.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=30)
    assert "/nowhere/config.yaml: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("name", ["TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])
def test_a_running_rank_is_watched(rank: Rank, tmp_path: Path, name: str) -> None:
    local = watchdog.heartbeat_folder(str(tmp_path), tmp_path / "jobs/train/attempt-2", 1)
    body = f"from pathlib import Path; print('BEAT', Path('{local}/rank-3.beat').read_text())"
    values = {"cluster.scratch": str(tmp_path), "cluster.network.save_timeout_s": 4000}
    done = rank(body, values, **TASK)
    expected = {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{local}/flight-", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "4120"}
    assert (done.returncode, job_environment(done)[name]) == (0, expected[name])
    assert '"phase": "start"' in done.stdout
    assert not local.exists()


def test_without_a_writable_scratch_the_job_runs_and_warns(rank: Rank, tmp_path: Path) -> None:
    (tmp_path / "full").touch()
    done = rank("pass", {"cluster.scratch": f"{tmp_path}/full"}, **TASK)
    assert done.returncode == 0
    assert f"cluster.scratch={tmp_path}/full: no watchdog, so hangs are not detected" in done.stdout


@pytest.mark.site(
    case="`environment: {MASTER_ADDR: ...}`",
    before="overwritten by the batch script",
    after="wins over Muster, srun and the container",
)
@pytest.mark.parametrize(
    "name", ["MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_CACHE_DIR", "GLOO_SOCKET_IFNAME"]
)
def test_what_the_cluster_file_sets_wins_on_every_rank(rank: Rank, name: str) -> None:
    value = {"MASTER_ADDR": "127.0.0.1", "TRITON_CACHE_DIR": str(Path.home() / "caches")}.get(name, "7")
    done = rank("pass", {"cluster.environment": {name: value}}, **TASK | {name: "198.51.100.9"})
    assert (job_environment(done)[name], logged_environment(done).get(name, value)) == (value, value)


@pytest.mark.site(
    case="`scratch: $SLURM_TMPDIR`", before="a folder named `$SLURM_TMPDIR`", after="the node's own folder"
)
def test_paths_are_those_of_the_node(rank: Rank, tmp_path: Path) -> None:
    values = {
        "cluster.scratch": "$FAST/${SLURM_NODEID}",
        "cluster.hf_home": "$FAST/hf",
        "cluster.secrets": ["NODE_KEY"],
    }
    (tmp_path / "secrets").write_text("NODE_KEY=from the file\n")
    done = rank("pass", values | {"cluster.secrets_file": "$FAST/secrets"}, **TASK, FAST=str(tmp_path))
    environ = job_environment(done)
    assert environ["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/1/muster-")
    assert (environ["HF_HOME"], environ["NODE_KEY"]) == (f"{tmp_path}/hf", "from the file")


def test_a_push_from_a_login_node_needs_no_disk_of_a_job(rank: Rank) -> None:
    local = {"SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_LOCALID": "0", "SUBMITIT_LOCAL_NTASKS": "1"}
    done = rank(
        "pass", {"cluster.scratch": "$SLURM_TMPDIR"}, JOB="push", SUBMITIT_EXECUTOR="local", MUSTER_ATTEMPT="1", **local
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("value", ["$NOT_SET/x", "${NOT_SET}", "/x/$EMPTY"])
def test_a_variable_that_is_not_set_ends_the_rank_in_words(rank: Rank, tmp_path: Path, value: str) -> None:
    done = rank("pass", {"cluster.scratch": value}, **TASK, EMPTY="")
    record = rank_record(tmp_path, 3)
    assert (done.returncode, record["status"]) == (2, "user_error")
    assert f"cluster.scratch={value}: " in record["reason"]
    assert "cluster.setup" in record["reason"]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.site(
    case="a folder for compiler caches is open to other users",
    before="ranks ran the programs that lay in it",
    after="a folder that only you own is used instead",
)
def test_caches_lie_in_a_private_folder(rank: Rank, tmp_path: Path) -> None:
    scratch, open_folder = tmp_path / "scratch", tmp_path / "open"
    for folder in (scratch, open_folder):
        folder.mkdir()
        folder.chmod(0o1777)
    (scratch / f"muster-{os.getuid()}").symlink_to(open_folder)
    done = rank("pass", {"cluster.scratch": str(scratch)}, **TASK, TRITON_CACHE_DIR=str(open_folder))
    values, base = job_environment(done), scratch / f"muster-{os.getuid()}-1"
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert Path(values[name]).parent == base
    assert base.stat().st_mode & 0o777 == 0o700
    assert f"TRITON_CACHE_DIR={open_folder} is not used" in done.stdout
    assert list(open_folder.iterdir()) == []
    assert values["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"].startswith(f"{base}/watch-")


def test_a_scratch_in_which_others_can_rename_ends_the_rank(rank: Rank, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    scratch.chmod(0o777)
    done = rank("pass", {"cluster.scratch": str(scratch)}, **TASK)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert rank_record(tmp_path, 3)["status"] == "user_error"
    assert "without the sticky bit" in rank_record(tmp_path, 3)["reason"]


def test_a_log_shows_no_password_of_a_url(rank: Rank) -> None:
    done = rank("pass", **TASK, TORCH_PROXY="http://me:pw5@proxy:1")
    assert "pw5" not in str(logged_environment(done))
    assert job_environment(done)["TORCH_PROXY"] == "http://me:pw5@proxy:1"
