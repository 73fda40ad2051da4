"""launch.py, killed at any moment, leaves no half-written file, and the same command given again writes the rest."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf import resolve
from launcher.run_folder import attempts
from tests.slurm.runs import wait_until
from tests.test_readme import CLONE

WORDS = ["cluster=slurm", "model=llama70b", "parallel=zero3", "submit=script"]


def test_a_killed_launch_can_be_repeated(tmp_path: Path) -> None:
    generator, began = random.Random(0), time.monotonic()
    launch(tmp_path / "run99")
    duration_s, expected = time.monotonic() - began, file_sizes(tmp_path / "run99")
    for number in range(12):
        run = tmp_path / f"run{number:02d}"  # as long a name as run99, so that the scripts have equal sizes
        with subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(duration_s * generator.uniform(0.4, 1.0))
            process.kill()
        for name in file_sizes(run):
            assert is_complete(run, name, expected[name]), name
        launch(run)
        assert file_sizes(run).keys() == expected.keys()


def command(run: Path) -> list[str]:
    return [sys.executable, str(CLONE / "launch.py"), *WORDS, f"run_dir={run}"]


def launch(run: Path) -> None:
    done = subprocess.run(command(run), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def file_sizes(run: Path) -> dict[str, int]:
    """Size of every file that a later command would read. Names that start with a dot are never read."""
    paths = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {
        str(path): (run / path).stat().st_size for path in paths if not any(part.startswith(".") for part in path.parts)
    }


def is_complete(run: Path, name: str, size: int) -> bool:
    path = run / name
    if name == "config.yaml":
        return resolve.load(path) is not None
    if path.suffix == ".json":
        return json.loads(path.read_text()) is not None
    return path.stat().st_size == size or path.name == "code.diff"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.proof)])
def test_ending_a_local_launch_ends_its_ranks(tmp_path: Path, number: signal.Signals) -> None:
    """The ranks have their own sessions, so neither a closed terminal nor `kill` reaches them directly."""
    run = tmp_path / "run"

    def process_ids() -> list[int]:
        return [rank["pid"] for rank in attempts.published_ranks(run / "jobs/train/attempt-1").values()]

    words = ["data=sample", "cluster=local", "pipeline=train", "train.steps=100000", f"run_dir={run}"]
    background = ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]  # as `launch.py &` does
    line = [*background, sys.executable, str(CLONE / "launch.py"), *words]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any("loss" in line for line in attempts.metrics(run)))
        wait_until(lambda: len(process_ids()) == 2)  # published every ten seconds
        ranks = process_ids()
        process.send_signal(number)
        assert process.communicate(timeout=60)[1].endswith("launch.py: stopped\n")
    assert process.returncode == 130
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
