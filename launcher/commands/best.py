"""The run that `merge` and `push` take of a sweep."""

from pathlib import Path

from conf.visible import visible
from launcher.run_folder import sweep_record
from launcher.status import sweep


def best_of(run: Path) -> Path:
    """Return the best run if this is a sweep, and say which one it is; else the run itself. Raises RunError without a best run."""
    if not sweep_record.is_sweep(run):
        return run
    best = sweep.require_best(run)
    print(visible(f"best      {best.name}"), flush=True)
    return best
