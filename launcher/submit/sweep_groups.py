"""Tells which runs of a sweep belong together: which share rows, which share an array, and whether only the best one is merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from conf import resolve
from conf.choices import SweepMerge
from conf.jobs import AFTER_TRAINING, BEFORE_TRAINING, JOB_KINDS, RESUMABLE
from launcher.submit import sweep_scripts
from launcher.submit.planned_run import PlannedRun


def owners(runs: Sequence[PlannedRun]) -> dict[Path, PlannedRun]:
    """For each run the first one that prepares the same: its jobs before training serve both. Without training: the run itself."""
    first: dict[str, PlannedRun] = {}
    return {run.folder: first.setdefault(_preparation(run), run) if run.training else run for run in runs}


def _preparation(run: PlannedRun) -> str:
    """What the jobs before training depend on, as text."""
    sections, names = resolve.plain(run.config), [job.name for job in run.jobs if job.name in BEFORE_TRAINING]
    cluster = dict(sections["cluster"])
    training = [cluster.pop("train"), sections["parallel"]]  # only preflight runs where the training will
    read = [sections["data"], sections["model"], sections["hub"], cluster]
    return repr([names, *read, *(training if "preflight" in names else [])])


def arrays(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs that train, in groups that ask Slurm for the same: an array has one set of options for all its tasks."""
    found: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if run.training:
            key = "\n".join([run.training.name, *sweep_scripts.directives(run.config, run.training)])
            found.setdefault(key, []).append(run)
    return list(found.values())


def merges_best(runs: Sequence[PlannedRun]) -> bool:
    """Whether only the best run is consolidated, evaluated and so on."""
    config = runs[0].config
    return config.sweep.merge is SweepMerge.best and bool(RESUMABLE.intersection(config.jobs))


def later_names(runs: Sequence[PlannedRun]) -> list[str]:
    """The jobs after training that any of the runs has."""
    return [name for name in JOB_KINDS if name in AFTER_TRAINING and any(run.job(name) for run in runs)]


def first_with(runs: Sequence[PlannedRun], name: str) -> PlannedRun:
    """The first run that has a job of this name."""
    return next(run for run in runs if run.job(name))


def after_all(name: str, trainings: Sequence[str], later: Mapping[str, str]) -> str:
    """The dependency of a job of the best run: on the jobs that it reads from, or else on all trainings, whatever came of them.

    `trainings`: the ids of the arrays. `later`: those of the best run's jobs so far, by name.
    """
    parents = [later[parent] for parent in JOB_KINDS[name].after if parent in AFTER_TRAINING and parent in later]
    return f"afterok:{':'.join(parents)}" if parents else f"afterany:{':'.join(trainings)}"
