"""launch.py killed at any moment leaves no file that is half there, and the same command given again does the rest."""

import json
import random
import subprocess
import sys
import time

from conf import resolve
from tests.test_readme import CLONE


def test_a_killed_launch_can_be_given_again(tmp_path):
    chance, words = random.Random(0), ["cluster=slurm", "model=llama70b", "parallel=zero3", "submit=script"]
    began = time.monotonic()
    _launch(tmp_path / "whole", words).wait()
    seconds = time.monotonic() - began
    expected = _files(tmp_path / "whole")
    for number in range(12):
        run = tmp_path / str(number)
        started = _launch(run, words)
        time.sleep(seconds * chance.uniform(0.4, 1.0))
        started.kill()
        started.wait()
        for path in (
            path for path in run.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts)
        ):
            _whole(path, expected[str(path.relative_to(run))])
        again = _launch(run, words)
        assert again.wait() == 0, again.stderr.read()
        again.stderr.close()
        assert _files(run).keys() == expected.keys()


def _launch(run, words):
    return subprocess.Popen(
        [sys.executable, CLONE / "launch.py", *words, f"run_dir={run}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _files(run):
    return {str(path.relative_to(run)): path.stat().st_size for path in run.rglob("*") if path.is_file()}


def _whole(path, size):
    if path.name == "config.yaml":
        resolve.load(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix in (".sbatch", ".sh") and "jobs" in path.parts[-2:]:
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    else:
        assert path.stat().st_size == size or path.name == "code.diff", path
