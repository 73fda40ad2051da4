"""Starts the runs of a sweep: on Slurm as jobs (`sweep_slurm.py`), or one after the other on this machine."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf import held_out, resolve
from conf.errors import UserError
from conf.jobs import AFTER_TRAINING, BEFORE_TRAINING
from conf.plural import plural
from conf.visible import visible
from launcher import plan
from launcher.run_folder import lock, record, sweep_record
from launcher.submit import preview, submit, sweep_groups, sweep_slurm
from launcher.submit.planned_run import PlannedRun

BY_SIGNAL = 128
"""An exit code above it: the launch was asked to end."""


class _EndedError(Exception):
    """The launch was asked to end while it ran jobs of a run."""

    def __init__(self, code: int) -> None:
        self.code = code


def start(
    folder: Path, runs: Sequence[PlannedRun], values: Mapping[str, Mapping[str, str]], command: Sequence[str]
) -> int:
    """Start a sweep, or what has not completed of it. Returns the exit code.

    `values`: the name of each run of a new sweep, with the values that are its own; empty if the sweep is continued.
    """
    if values:
        lowest = runs[0].config.consolidate.step == held_out.BEST
        sweep_record.write(folder, values, list(command), merges_best_step=lowest)
        for run in runs:  # so that a sweep that was interrupted can be continued
            resolve.save(run.config, run.folder / "config.yaml")
    print(visible("\n".join(summary(folder, runs))), flush=True)
    if sweep_groups.merges_best(runs) and not sweep_groups.arrays(runs):  # all have been trained before
        best = sweep_record.best(folder)
        runs = [run for run in runs if run.folder == best]
    if not any(run.jobs for run in runs):
        print("nothing to do: all jobs completed with this configuration before")
        return 0
    here = all(plan.runs_here(run.config) for run in runs)
    try:
        return _run_here(folder, runs, command) if here else sweep_slurm.submit_all(folder, runs, command)
    finally:
        shown = shlex.quote(str(folder))
        print(f"\nwatch     muster status {shown}\ncompare   muster compare {shown}\nresume    muster resume {shown}")


def summary(folder: Path, runs: Sequence[PlannedRun]) -> list[str]:
    """The sweep in a few lines: its runs, and what its first run does."""
    first = runs[0].config
    setting = first.sweep
    lines = [f"sweep     {folder}: {plural(len(runs), 'run')}", *(f"          {run.folder.name}" for run in runs)]
    if setting.stop_worst:
        lines.append(f"ends      {setting.stop_worst}: a training ends there if its loss is among the worst")
    if (count := len(sweep_groups.arrays(runs))) > 1 and not plan.runs_here(runs[0].config):
        each = "; sweep.at_once counts for each" if setting.at_once else ""
        lines.append(f"arrays    {count}, because the runs ask for different resources{each}")
    if sweep_groups.merges_best(runs) and sweep_groups.later_names(runs):
        lines.append(f"best      {', '.join(sweep_groups.later_names(runs))}: only of the run with the lowest loss")
    return [*lines, "", *preview.summary(first, runs[0].jobs, record.training_rows(first)).splitlines()]


def preview_text(folder: Path, runs: Sequence[PlannedRun]) -> str:
    """Everything that would be submitted: the scripts of the sweep, and the jobs of its first run."""
    parts = summary(folder, runs)
    if not plan.runs_here(runs[0].config):
        for name, text in sweep_slurm.scripts(folder, runs):
            parts += [preview.heading(f"the sweep's {name}"), text]
    return "\n".join([*parts, preview.heading("its first run"), preview.text(runs[0].config, runs[0].jobs)])


def _run_here(folder: Path, runs: Sequence[PlannedRun], command: Sequence[str]) -> int:
    """Run one training after the other, and then the later jobs of the best run. Returns 1 if a job has failed.

    Ctrl-C, which lets a training save and end, also ends the sweep.
    """
    try:
        with lock.held(folder):
            sweep_record.set_cancelled(folder, set())
            return _one_by_one(folder, runs, command)
    except _EndedError as ended:
        return ended.code


def _one_by_one(folder: Path, runs: Sequence[PlannedRun], command: Sequence[str]) -> int:
    """Do so, with the folder of the sweep held."""
    chooses = sweep_groups.merges_best(runs) and bool(sweep_groups.arrays(runs))
    owners, failed = sweep_groups.owners(runs), list[str]()
    for number, run in enumerate(runs, 1):
        print(visible(f"\n==== run {number} of {len(runs)}: {run.folder.name}"), flush=True)
        jobs = [job for job in run.jobs if not (chooses and job.name in AFTER_TRAINING)]
        if run.training and run.training.name in sweep_record.cancelled(folder):
            print("cancelled by muster cancel")
            failed.append(run.folder.name)
            continue
        if _takes_rows_over(run, owners[run.folder]):
            jobs = [job for job in jobs if job.name not in BEFORE_TRAINING]
        if jobs and _code_of(run, jobs, command):
            failed.append(run.folder.name)
    best = sweep_record.best(folder) if chooses else None
    if chooses and best is None:
        print("muster: no training of the sweep has completed, so there is no best run", file=sys.stderr)
    for run in runs:
        jobs = [job for job in run.jobs if job.name in AFTER_TRAINING]
        if run.folder == best and jobs:
            print(visible(f"\n==== the best run: {best.name}"), flush=True)
            if _code_of(run, jobs, command):
                failed.append(best.name)
    for name in failed:
        print(visible(f"failed    {name}"), file=sys.stderr)
    return 1 if failed else 0


def _takes_rows_over(run: PlannedRun, owner: PlannedRun) -> bool:
    """Copy RUN/data of another run with the same settings, if that has prepared it. Returns whether `run` has it now."""
    source, target = owner.folder / "data", run.folder / "data"
    if owner is run or not run.job("preprocess") or not (source / "data.json").exists():
        return False
    if not target.exists():
        shutil.copytree(source, target, symlinks=True)  # its links to the tokenized sets are relative, and stay right
    return True


def _code_of(run: PlannedRun, jobs: Sequence[plan.Job], command: Sequence[str]) -> int:
    """Run jobs of a run. An error of one run does not end the sweep, but a signal such as Ctrl-C raises _EndedError."""
    try:
        code = submit.submit(run.config, jobs, command)
    except UserError as error:
        print(f"muster: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if code > BY_SIGNAL:
        raise _EndedError(code)
    return code
