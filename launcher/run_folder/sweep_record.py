"""Reads and writes SWEEP/sweep.json, the record of a sweep, and tells which of its runs is the best.

Every function that takes `folder` means the folder of the sweep. Its runs are folders in it.
"""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from conf import sweep
from conf.errors import Problem, RunError
from conf.files import write_json
from conf.jobs import RESUMABLE
from launcher.run_folder import attempts
from launcher.run_folder.status import COMPLETED

CANCELLED = ".cancelled.json"
"""In the folder of a sweep: the kinds of jobs that the user has cancelled while the sweep runs on this machine."""
LAST_STEPS = 21
"""Steps over which a training loss is the median: that of one step depends on its rows."""


def is_sweep(folder: Path) -> bool:
    """Whether this is the folder of a sweep."""
    return (folder / sweep.FILE).is_file()


def write(folder: Path, runs: Mapping[str, Mapping[str, str]], command: list[str], *, merges_best_step: bool) -> None:
    """Record a new sweep. `runs`: the name of each run, with the values that are its own.

    `merges_best_step`: the checkpoint that is merged is the one with the lowest held-out loss, not the last one.
    """
    content = {"command": command, "merges_best_step": merges_best_step, "runs": runs, "jobs": {}}
    write_json(folder / sweep.FILE, content)


def runs(folder: Path) -> list[Path]:
    """Return the folders of the runs, in the order of the launch. Raises RunError for a damaged record."""
    names = _read(folder)["runs"]
    return [folder / name for name in names]


def jobs(folder: Path) -> dict[str, str]:
    """Return the Slurm ids of the jobs of the best run, which start when all trainings have ended, by the jobs' names."""
    return {str(name): str(job_id) for name, job_id in _read(folder)["jobs"].items()}


def set_jobs(folder: Path, ids: Mapping[str, str]) -> None:
    """Record the ids of the jobs of the best run."""
    write_json(folder / sweep.FILE, _read(folder) | {"jobs": dict(ids)})


def cancelled(folder: Path) -> set[str]:
    """Return the kinds of jobs that a launch on this machine must not start any more, because the user has cancelled them."""
    names = (attempts.read_record(folder / CANCELLED) or {}).get("jobs")
    return set(map(str, names)) if isinstance(names, list) else set()


def set_cancelled(folder: Path, names: set[str]) -> None:
    """Record these kinds of jobs."""
    write_json(folder / CANCELLED, {"jobs": sorted(names)})


def best(folder: Path) -> Path | None:
    """Return the run with the lowest loss of those that were trained to the end; None if there is none.

    Held-out losses are compared, or training losses if not every run has a held-out one.
    """
    found = [run for run in runs(folder) if has_ended(run) and not ended_early(run)]
    lowest = _read(folder).get("merges_best_step") is True
    held_out = {run: loss for run in found if (loss := held_out_loss(run, lowest=lowest)) is not None}
    if len(held_out) == len(found) > 0:
        return min(held_out, key=lambda run: held_out[run])
    training = {run: loss for run in found if (loss := training_loss(run)) is not None}
    return min(training, key=lambda run: training[run], default=None)


def has_ended(run: Path) -> bool:
    """Whether the run's newest attempt to train has completed."""
    verdicts = (attempts.last_verdict(run / "jobs" / name) for name in sorted(RESUMABLE))
    return any(verdict is not None and verdict["status"] == COMPLETED for verdict in verdicts)


def ended_early(run: Path) -> bool:
    """Whether the run's newest attempt to train ended early because it was one of the worst (`sweep.stop_worst`)."""
    verdicts = (attempts.last_verdict(run / "jobs" / name) for name in sorted(RESUMABLE))
    return any(verdict is not None and verdict.get("ended_early") is True for verdict in verdicts)


def held_out_loss(run: Path, *, lowest: bool = False) -> float | None:
    """Return the last held-out loss after step 0, or the lowest one; None if there is none."""
    losses = _numbers(run, "eval_loss")
    return min(losses if lowest else losses[-1:], default=None)


def training_loss(run: Path) -> float | None:
    """Return the median of the last training losses; None before the first step."""
    losses = _numbers(run, "loss")[-LAST_STEPS:]
    return median(losses) if losses else None


def _numbers(run: Path, name: str) -> list[float]:
    """The values of a name in metrics.jsonl after step 0, in the order of the steps."""
    values = (line.get(name) for line in attempts.metrics(run) if line.get("step", 0) > 0)
    return [float(value) for value in values if isinstance(value, (int, float)) and value == value]


def _read(folder: Path) -> dict[str, Any]:
    """Return the record. Names of runs become paths, and ids words of scancel, so both are checked."""
    content = attempts.read_record(folder / sweep.FILE) or {}
    names, ids = content.get("runs"), content.get("jobs")
    is_good = isinstance(names, dict) and all(name and "/" not in name and name not in (".", "..") for name in names)
    if not is_good or not isinstance(ids, dict) or not all(str(job_id).isdigit() for job_id in ids.values()):
        raise RunError(Problem("SWEEP", folder, f"has a {sweep.FILE} that is damaged, or that Muster did not write"))
    return content
