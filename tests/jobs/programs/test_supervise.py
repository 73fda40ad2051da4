"""The job `custom` runs a real program: what it gets on a node whose GPUs lack peer access and bf16, and what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.resolve import dump
from tests.conftest import Compose, put
from tests.jobs.programs.test_command import DRIVER

REPORTS = "import os; print('P2P', os.environ.get('NCCL_P2P_DISABLE'), os.environ['ACCELERATE_MIXED_PRECISION'])"
LEAVES_A_PROCESS = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        with open(sys.argv[1], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
os.wait()
while not os.path.exists(sys.argv[1]) or not os.path.getsize(sys.argv[1]):
    time.sleep(0.01)
"""


def run(compose: Compose, folder: Path, program: str, variables: dict[str, str], gpus: int = 0) -> str:
    """Run the job `custom` with a program, and return its output."""
    (folder / "train.py").write_text(program)
    config = compose("cluster=slurm", "pipeline=custom", "custom.launcher=srun")
    values = {"custom.command": f"train.py {folder}/pid", "custom.folder": str(folder), "cluster.scratch": str(folder)}
    put(config, values | {"run_dir": str(folder / "run"), "cluster.train.gpus_per_node": gpus})
    (folder / "config.yaml").write_text(dump(config))
    place = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    words = [sys.executable, "-m", "jobs", "custom", folder / "config.yaml"]
    done = subprocess.run(
        words, env=os.environ | place | variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("variables", "expected"), [({}, "1"), ({"NCCL_P2P_DISABLE": "0"}, "0")])
def test_a_program_learns_what_the_gpus_of_its_node_lack(
    compose: Compose, tmp_path: Path, variables: dict[str, str], expected: str
) -> None:
    (tmp_path / "cuda.c").write_text(DRIVER.replace("ANSWER", "0"))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    output = run(compose, tmp_path, REPORTS, {"LD_LIBRARY_PATH": str(tmp_path), **variables}, gpus=2)
    assert f"P2P {expected} fp16\n" in output
    assert json.loads((tmp_path / "run/precision.json").read_text())["precision"] == "fp16"


def test_a_process_that_the_program_leaves_behind_is_ended(compose: Compose, tmp_path: Path) -> None:
    run(compose, tmp_path, LEAVES_A_PROCESS, {})
    left, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}"), time.monotonic() + 5
    while left.exists() and time.monotonic() < deadline:  # killed, and not yet forgotten by the system
        time.sleep(0.05)
    assert not left.exists()
