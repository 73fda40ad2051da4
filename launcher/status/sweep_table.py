"""Prints what `muster status` shows of a sweep: its runs, the jobs that wait for the end of all trainings, and the best run."""

from pathlib import Path

from conf.plural import plural
from conf.visible import visible
from launcher.run_folder import sweep_record
from launcher.status import listing, tables
from launcher.status.sweep import SweepState


def show(folder: Path, found: SweepState) -> None:
    """Print one row per run, as `muster ls` does, and what comes after them."""
    if runs := listing.summaries(folder):
        tables.runs(runs, folder)
    if waiting := len(sweep_record.runs(folder)) - len(found.runs):
        print(f"not started: {plural(waiting, 'run')}")
    for name, job in found.later.items():
        print(f"{name} {job.job_id} of the best run: {job.state.lower()}")
    if best := sweep_record.best(folder):
        print(visible(f"best {'so far ' if found.is_live else ''}{best.name}"))
