"""Decides which jobs a run has, what each asks of the scheduler, and which waits for which; pure."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from conf.jobs import JOB_KINDS
from conf.schema import Config, Resources


@dataclass(frozen=True)
class Job:
    """One piece of work: a name that `jobs.run` knows, resources, and the jobs that must complete before it."""

    name: str
    resources: Resources
    after: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.resources.nodes * self.resources.ranks_per_node

    @property
    def distributed(self) -> bool:
        return JOB_KINDS[self.name].distributed


def resources(config: Config, name: str) -> Resources:
    """The resources of a job: its kind's section of `cluster`, cut to one rank where the kind is one process."""
    kind = JOB_KINDS[name]
    section: Resources = getattr(config.cluster, kind.section)
    if kind.single_rank and section.nodes * section.ranks_per_node > 1:
        return replace(section, nodes=1, ranks_per_node=1)
    return section


def plan(config: Config, done: Collection[str] = ()) -> list[Job]:
    """The jobs to start, each after those that it reads from.

    Jobs in `done` are left out, unless a job whose result they read runs again.
    """
    names: list[str] = []
    for name, kind in JOB_KINDS.items():
        inputs_change = any(item in names for item in kind.after)
        if name in config.jobs and (name not in done or inputs_change):
            names.append(name)
    return [
        Job(name, resources(config, name), tuple(item for item in JOB_KINDS[name].after if item in names))
        for name in names
    ]
