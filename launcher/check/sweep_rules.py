"""Refuses settings of a sweep that cannot be read, or that would change nothing; pure."""

from collections.abc import Iterator, Sequence

from conf import sweep
from conf.choices import Executor, SweepMerge
from conf.errors import Problem
from conf.jobs import AFTER_TRAINING, RESUMABLE
from conf.schema import Config


def problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the section `sweep` of one run."""
    trains, merges = RESUMABLE.intersection(config.jobs), AFTER_TRAINING.intersection(config.jobs)
    if config.sweep.stop_worst is not None and trains:
        yield from _stop_worst(config, config.sweep.stop_worst)
    if config.sweep.at_once is not None and config.cluster.executor is Executor.local and config.sweep.at_once != 1:
        message = "cluster=local runs one training after the other. Remove it, or use cluster=slurm"
        yield Problem("sweep.at_once", config.sweep.at_once, message)
    if config.sweep.merge is SweepMerge.all and trains and not merges:
        message = "has no effect, because the jobs end with training. Remove it, or use pipeline=finetune"
        yield Problem("sweep.merge", "all", message)


def across(configs: Sequence[Config]) -> list[Problem]:
    """What is wrong with the runs of a sweep together."""
    first, found = configs[0], list[Problem]()
    if any(config.jobs != first.jobs for config in configs):
        found.append(Problem("jobs", None, "must be the same in all runs of a sweep. Launch one sweep for each"))
    if any(config.cluster.executor is not first.cluster.executor for config in configs):
        found.append(Problem("cluster", None, "must be Slurm's in all runs of a sweep, or this machine in all"))
    merges_best = first.sweep.merge is SweepMerge.best and bool(RESUMABLE.intersection(first.jobs))
    if merges_best and AFTER_TRAINING.intersection(first.jobs):
        later = [(config.cluster.cpu, config.cluster.inference, config.cluster.account) for config in configs]
        if any(item != later[0] for item in later):
            message = "needs the same cluster.cpu and cluster.inference in all runs. Use sweep.merge=all"
            found.append(Problem("sweep.merge", "best", message))
    pushed = [config.hub.push for config in configs if config.hub.push]
    if "push" in first.jobs and not merges_best and len(set(pushed)) < len(pushed):
        message = (
            "would be pushed to by several runs, each in place of the one before. Use sweep.merge=best, or push one run"
        )
        found.append(Problem("hub.push", pushed[0], message))
    return found


def _stop_worst(config: Config, value: str) -> Iterator[Problem]:
    try:
        rule = sweep.stop_worst(value)
    except ValueError:
        message = "is not of the form 0.5@25%: the share of the runs, and the part of their steps after which they end"
        yield Problem("sweep.stop_worst", value, message)
        return
    if "custom" in config.jobs:
        message = "cannot see the losses of your own program. Remove it"
        yield Problem("sweep.stop_worst", value, message)
    elif config.train.steps and rule.step(config.train.steps) >= config.train.steps:
        message = (
            f"is the last step of train.steps={config.train.steps}, so nothing would end earlier. Use a smaller part"
        )
        yield Problem("sweep.stop_worst", value, message)
