"""launch.py killed at any moment leaves no file that is half there, and the same command given again does the rest."""

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
from tests.slurm.runs import until
from tests.test_readme import CLONE

WORDS = ["cluster=slurm", "model=llama70b", "parallel=zero3", "submit=script"]


def test_a_killed_launch_can_be_given_again(tmp_path):
    chance, began = random.Random(0), time.monotonic()
    launch(tmp_path / "run99")
    seconds, expected = time.monotonic() - began, files(tmp_path / "run99")
    for number in range(12):
        run = tmp_path / f"run{number:02d}"  # as long as run99, so that scripts are of equal size
        with subprocess.Popen(command(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
            time.sleep(seconds * chance.uniform(0.4, 1.0))
            started.kill()
        for name in files(run):
            assert is_whole(run, name, expected[name]), name
        launch(run)
        assert files(run).keys() == expected.keys()


def command(run):
    return [sys.executable, CLONE / "launch.py", *WORDS, f"run_dir={run}"]


def launch(run):
    done = subprocess.run(command(run), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def files(run):
    """Size of every file that a later command would read: those whose names start with a dot are never read."""
    found = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {
        str(name): (run / name).stat().st_size for name in found if not any(part.startswith(".") for part in name.parts)
    }


def is_whole(run, name, size):
    path = run / name
    if name == "config.yaml":
        return resolve.load(path) is not None
    if path.suffix == ".json":
        return json.loads(path.read_text()) is not None
    return path.stat().st_size == size or path.name == "code.diff"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.proof)])
def test_a_launch_that_is_ended_here_ends_its_ranks(tmp_path, number):
    """They have sessions of their own, which neither a closed terminal nor `kill` reaches."""
    run = tmp_path / "run"

    def found():
        return [rank["pid"] for rank in attempts.published_ranks(run / "jobs/train/attempt-1").values()]

    words = ["data=sample", "cluster=local", "pipeline=train", "train.steps=100000", f"run_dir={run}"]
    background = ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]  # as `launch.py &` does
    line = [*background, sys.executable, CLONE / "launch.py", *words]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as started:
        until(lambda: any("loss" in line for line in attempts.metrics(run)))
        until(lambda: len(found()) == 2)  # said every ten seconds
        ranks = found()
        started.send_signal(number)
        assert started.communicate(timeout=60)[1].endswith("launch.py: stopped\n")
    assert started.returncode == 130
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
