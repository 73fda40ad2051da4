"""Decides which jobs a run has, what resources each gets, and which jobs it waits for. Pure: reads only the config."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from conf.choices import Executor, ProgramLauncher, Where
from conf.jobs import JOB_KINDS
from conf.schema import Config
from conf.schema_cluster import Resources


@dataclass(frozen=True)
class Job:
    """One job of a run: its kind, its resources, and the jobs that must complete before it starts."""

    name: str
    """A key of JOB_KINDS, and the name that `jobs.run` is called with."""
    resources: Resources
    after: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.resources.ranks

    @property
    def distributed(self) -> bool:
        return JOB_KINDS[self.name].distributed


def resources(config: Config, name: str) -> Resources:
    """Return the job's section of `cluster`, with as many ranks as Slurm starts: one for kinds that are a single process."""
    kind = JOB_KINDS[name]
    section: Resources = getattr(config.cluster, kind.section)
    if kind.single_rank and section.ranks > 1:
        return replace(section, nodes=1, ranks_per_node=1)
    if starts_whole_nodes(config, name):
        return replace(section, ranks_per_node=1, cpus_per_rank=section.ranks_per_node * section.cpus_per_rank)
    return section


def starts_whole_nodes(config: Config, name: str) -> bool:
    """Whether Slurm starts one task on each node, which starts the ranks of that node itself, as torchrun does."""
    return name == "custom" and config.custom.launcher is not ProgramLauncher.srun


def ranks_per_task(config: Config, name: str) -> int:
    """Return how many ranks share what Slurm gives to one task."""
    return config.cluster.train.ranks_per_node if starts_whole_nodes(config, name) else 1


def add_push(config: Config) -> None:
    """Let a run that consolidates also push the result, if `hub.push` names a repository."""
    if config.hub.push and "consolidate" in config.jobs and "push" not in config.jobs:
        config.jobs.append("push")


def runs_here(config: Config) -> bool:
    """Whether the jobs run on this machine: with `cluster=local`, and fetch and push with `hub.where=here`."""
    only_hub = bool(config.jobs) and all(name in JOB_KINDS and JOB_KINDS[name].needs_hub for name in config.jobs)
    return config.cluster.executor is Executor.local or (only_hub and config.hub.where is Where.here)


def plan(config: Config, done: Collection[str] = ()) -> list[Job]:
    """Return the jobs to start, in an order in which every job comes after its inputs.

    Jobs in `done` are left out, unless a job that they read from runs again.
    """
    names: list[str] = []
    for name, kind in JOB_KINDS.items():
        inputs_change = any(parent in names for parent in kind.after)
        if name in config.jobs and (name not in done or inputs_change):
            names.append(name)
    return [
        Job(name, resources(config, name), tuple(parent for parent in JOB_KINDS[name].after if parent in names))
        for name in names
    ]
