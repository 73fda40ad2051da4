"""Decides which jobs a run has, what each asks of the scheduler, and which waits for which; pure."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from conf.schema import Config, Resources

AFTER = {
    "preflight": (),
    "preprocess": (),
    "train": ("preflight", "preprocess"),
    "consolidate": ("train",),
    "evaluate": ("preprocess", "consolidate"),
    "generate": ("consolidate",),
}
"""Every job with the jobs whose results it reads. The order is the order of submission."""

DISTRIBUTED = ("preflight", "train")
"""Jobs of more than one rank: they need a rendezvous."""


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
        return self.name in DISTRIBUTED


def resources(config: Config, name: str) -> Resources:
    """What a job gets, from the section of `cluster` that is for its kind; preprocess is one process whatever consolidate gets."""
    if name in DISTRIBUTED:
        return config.cluster.train
    if name in ("evaluate", "generate"):
        return config.cluster.inference
    cpu = config.cluster.cpu
    shared = cpu.nodes * cpu.ranks_per_node > 1
    return replace(cpu, nodes=1, ranks_per_node=1) if shared and name == "preprocess" else cpu


def plan(config: Config, done: Collection[str] = ()) -> list[Job]:
    """The jobs to start, each after those it reads from. Jobs in `done` are left out, unless what they read is made anew."""
    names: list[str] = []
    for name in AFTER:
        again = any(item in names for item in AFTER[name])  # what it reads will change
        if name in config.jobs and (name not in done or again):
            names.append(name)
    return [Job(name, resources(config, name), tuple(item for item in AFTER[name] if item in names)) for name in names]
