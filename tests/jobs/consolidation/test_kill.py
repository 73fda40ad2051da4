"""If a job is killed at any moment, its result is complete or absent, and the next start completes it."""

import random
import subprocess
import sys
import time

import pytest

from conf.files import read_json
from tests.jobs import ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("job", "result"),
    [pytest.param("preprocess", "data/data.json", marks=pytest.mark.proof), ("consolidate", "model/muster.json")],
)
def test_a_killed_job_leaves_no_partial_result(job, result, tmp_path) -> None:
    run = tmp_path / "run"
    ranks.run(
        f"run_dir={run}",
        "train.steps=1",
        "train.warmup_steps=0",
        "data.max_rows=300",
        "jobs=[preprocess,train,consolidate]",
    )
    folder = run / result.split("/")[0]
    whole = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "jobs", job, run / "config.yaml"]
    began = time.monotonic()
    _clear(folder)
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - began
    chance = random.Random(0)
    for _ in range(2):
        _clear(folder)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
            time.sleep(seconds * chance.uniform(0.6, 1.0))
            started.kill()
        assert read_json(run / result) is not None or not folder.exists()
    subprocess.run(command, check=True, capture_output=True)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole


def _clear(folder) -> None:
    if folder.exists():
        subprocess.run(["rm", "-rf", folder], check=True)
