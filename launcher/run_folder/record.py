"""RUN/run.json: each launch of a run with its command, code and job ids. Written here, and nowhere else."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from conf.files import read_json, write_json


def read(run: Path) -> list[dict[str, Any]]:
    """The launches of a run, oldest first. Raises RunError where `run` is no run folder."""
    record = read_json(run / "run.json")
    if not isinstance(record, dict):
        raise RunError(Problem("RUN", run, "is no run folder: it has no run.json"))
    launches: list[dict[str, Any]] = record["launches"]
    return launches


def add_launch(run: Path, command: Sequence[str], cluster: str, code: dict[str, Any]) -> None:
    """Record a launch before its first job is started."""
    launches = read(run) if (run / "run.json").exists() else []
    launch = {
        "command": list(command),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cluster": cluster,
        "python": sys.version.split()[0],
        **code,
        "jobs": {},
    }
    write_json(run / "run.json", {"launches": [*launches, launch]})


def add_job(run: Path, name: str, job_id: str) -> None:
    """Record the id of a job that the newest launch has just started."""
    launches = read(run)
    launches[-1]["jobs"][name] = job_id
    write_json(run / "run.json", {"launches": launches})


def newest_jobs(run: Path) -> dict[str, tuple[str, str]]:
    """Id and cluster of the newest start of each job; scripts submitted by hand are known by the attempts they opened."""
    by_hand: dict[str, tuple[str, str]] = {}
    for path in sorted(run.glob("jobs/*/attempt-*/begin.json"), key=lambda path: path.stat().st_mtime):
        by_hand[path.parent.parent.name] = (str((read_json(path) or {}).get("job_id")), "slurm")
    return by_hand | {
        name: (job_id, launch["cluster"]) for launch in read(run) for name, job_id in launch["jobs"].items()
    }
