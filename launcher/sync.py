"""Sends what trackers recorded offline: `muster sync RUN`, from a node that has a network."""

import subprocess
import sys
from pathlib import Path

from conf import resolve
from conf.errors import Problem, RunError


def commands(run: Path, python: str) -> list[list[str]]:
    """A command for each tracker that has something in the run folder: W&B's own, and Comet's own."""
    found = []
    if folders := sorted(run.glob("wandb/offline-run-*")):
        found.append([python, "-m", "wandb", "sync", *map(str, folders)])
    if archives := sorted(run.glob("comet/*.zip")):
        found.append([python, "-m", "comet_ml.scripts.comet_upload", *map(str, archives)])
    return found


def sync(run: Path) -> int:
    """Run them. Returns the exit code of the first that fails, else 0. Raises RunError if there is nothing to send."""
    python = resolve.load(run / "config.yaml").cluster.python
    here = python if python and Path(python).exists() else sys.executable
    if not (found := commands(run, here)):
        message = "has no metrics that were recorded offline by W&B or Comet. Runs with a network send them at once"
        raise RunError(Problem("RUN", run, message))
    for command in found:
        print(" ".join(command[:4]), "...", flush=True)
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0
