"""Checks one run on this site, chooses what its config leaves open, and plans the jobs to start."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from conf.choices import Executor
from conf.errors import ConfigError
from conf.jobs import RESUMABLE
from conf.resolve import resolve
from conf.schema import Config
from launcher import plan
from launcher.check import cluster_wide, command_line, local_gpus, localize, model_rules, observe, resume, rules
from launcher.estimate import auto_settings
from launcher.plan import Job
from launcher.submit import preview, rewind


class PlannedRun(NamedTuple):
    """One run, and the jobs of it that are to be started."""

    config: Config
    jobs: list[Job]

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def training(self) -> Job | None:
        """The job that trains, if it is to be started."""
        return next((job for job in self.jobs if job.name in RESUMABLE), None)

    def job(self, name: str) -> Job | None:
        """The job of a name, if it is to be started."""
        return next((job for job in self.jobs if job.name == name), None)


def config_of(composed: DictConfig, words: Sequence[str]) -> Config:
    """The config of a run on this machine; that of a run which is continued is the stored one with what `words` change."""
    config = resolve(composed)
    if not config.resume:
        cluster_wide.apply(config, words)
    localize.localize(config, local_gpus.usable())
    if config.resume:
        config = resume.resumed_config(config, list(words))
        cluster_wide.apply(config, words)
    return config


def checked(config: Config, words: Sequence[str]) -> tuple[PlannedRun, list[str]]:
    """The run with what is chosen for it, and notes to print. `words`: its command line. Raises UserError with every problem."""
    plan.add_push(config)
    given, gpus_per_node = cluster_wide.take(config), config.cluster.train.gpus_per_node or 0
    facts = observe.observe(config, command_line.keys(words))
    if problems := rules.problems(config, facts):
        raise ConfigError(*cluster_wide.as_given(problems, given, gpus_per_node))
    config, chosen = auto_settings.choose(config)
    if facts.existing:
        resume.require_same(facts.existing, config)
    notes = [*_notes(config, facts, chosen), *rewind.notes(facts.existing, config)]
    return PlannedRun(config, plan.plan(config, done=resume.completed_jobs(config))), notes


def _notes(config: Config, facts: observe.Facts, chosen: Sequence[str]) -> Iterator[str]:
    """The lines before the summary: the device, what the checks have to say, and variables that the jobs do not get."""
    if "train" in config.jobs and config.cluster.executor is Executor.local:
        yield f"device    {local_gpus.described(config.cluster.train.gpus_per_node or 0)}"
    yield from facts.hub.notes
    if "train" in config.jobs:
        yield from (*model_rules.notes(config, facts.model), *chosen)
    if not plan.runs_here(config):
        yield from preview.ignored_variables(os.environ)
