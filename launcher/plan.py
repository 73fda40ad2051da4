"""Decides which jobs a run has, what resources each gets, and which jobs it waits for. Pure: reads only the config."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from conf.choices import ProgramLauncher
from conf.jobs import JOB_KINDS
from conf.schema import Config, Resources


@dataclass(frozen=True)
class Job:
    """One job of a run: its kind, its resources, and the jobs that must complete before it starts."""

    name: str
    """A key of JOB_KINDS, and the name that `jobs.run` is called with."""
    resources: Resources
    after: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.resources.nodes * self.resources.ranks_per_node

    @property
    def distributed(self) -> bool:
        return JOB_KINDS[self.name].distributed


def resources(config: Config, name: str) -> Resources:
    """Return the job's section of `cluster`, with as many ranks as Slurm starts: one for kinds that are a single process."""
    kind = JOB_KINDS[name]
    section: Resources = getattr(config.cluster, kind.section)
    if kind.single_rank and section.nodes * section.ranks_per_node > 1:
        return replace(section, nodes=1, ranks_per_node=1)
    if name == "custom" and config.custom.launcher is not ProgramLauncher.srun:  # one task starts all ranks of its node
        return replace(section, ranks_per_node=1, cpus_per_rank=section.ranks_per_node * section.cpus_per_rank)
    return section


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
