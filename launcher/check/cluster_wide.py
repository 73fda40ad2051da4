"""Applies `cluster.gpus` and `cluster.partition`, each of which sets keys in the sections of `cluster`; pure."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from conf.choices import Executor
from conf.errors import ConfigError, Problem
from conf.schema import Config
from launcher.check import command_line

SECTIONS = ("train", "cpu", "inference")
SET_BY_GPUS = ("cluster.train.nodes", "cluster.train.ranks_per_node", "cluster.train.gpus_per_node")
RANKS_ON_CPU = 2
"""Ranks of a training on this machine if it uses no GPU: enough to show what ranks do."""
OF_GPUS = re.compile(r"cluster\.train\.(?P<name>nodes|ranks_per_node|gpus_per_node)=(?P<value>\d+)")
OF_PARTITION = re.compile(rf"cluster\.({'|'.join(SECTIONS)})\.partition")


class Given(NamedTuple):
    """`cluster.gpus` and `cluster.partition` as the user has set them."""

    gpus: int | None
    partition: str | None


def apply(config: Config, words: Sequence[str]) -> None:
    """Set the keys that these two stand for, in place. `words` are the command line.

    Raises ConfigError that names each key with another value.
    """
    if problems := [*_conflicts(config, words), *_gpus(config), *_partition(config)]:
        raise ConfigError(*problems)


def take(config: Config) -> Given:
    """Return the two, and set them to null: the run keeps only what follows from them."""
    given = Given(config.cluster.gpus, config.cluster.partition)
    config.cluster.gpus = config.cluster.partition = None
    return given


def as_given(problems: Sequence[Problem], given: Given, gpus_per_node: int) -> list[Problem]:
    """The problems with the keys that the user has set, instead of those that follow from them."""
    renamed = []
    for problem in problems:
        key, value, message = problem.key, problem.value, problem.message
        if given.gpus is not None:
            if key in SET_BY_GPUS:
                key, value = "cluster.gpus", given.gpus
            message = OF_GPUS.sub(lambda match: _as_gpus(match, given.gpus or 0, gpus_per_node), message)
        if given.partition is not None:
            if OF_PARTITION.fullmatch(key):
                key, value = "cluster.partition", given.partition
            message = OF_PARTITION.sub("cluster.partition", message)
        renamed.append(Problem(key, value, message))
    return list(dict.fromkeys(renamed))


def _as_gpus(match: re.Match[str], gpus: int, gpus_per_node: int) -> str:
    """How a message says one of `SET_BY_GPUS` to someone who has set `cluster.gpus`."""
    name, value = match["name"], int(match["value"])
    if name == "gpus_per_node" and value == 0:
        return "cluster.gpus=0"
    if name == "nodes" and gpus_per_node:
        return f"cluster.gpus={value * gpus_per_node}"
    return f"{match[0]} (from cluster.gpus={gpus})"


def _conflicts(config: Config, words: Sequence[str]) -> Iterator[Problem]:
    """Keys that were typed beside `cluster.gpus`, which sets them. A cluster's YAML may have them: it says what a node has."""
    typed = dict(command_line.settings(words))
    for key in SET_BY_GPUS if config.cluster.gpus is not None else ():
        if key in typed:
            yield Problem(key, typed[key], f"cluster.gpus={config.cluster.gpus} sets it. Remove one of them")


def _gpus(config: Config) -> Iterator[Problem]:
    gpus, train = config.cluster.gpus, config.cluster.train
    if gpus is None:
        return
    if gpus < 0:
        yield Problem("cluster.gpus", gpus, "must be at least 0")
        return
    if config.cluster.executor is Executor.local:
        train.nodes, train.ranks_per_node, train.gpus_per_node = 1, gpus or RANKS_ON_CPU, gpus
        return
    per_node = train.gpus_per_node or train.ranks_per_node
    if gpus == 0:
        message = "only cluster=local trains on the CPU in this way. For CPU ranks set cluster.train.gpus_per_node=0"
        yield Problem("cluster.gpus", gpus, message)
    elif gpus > per_node and gpus % per_node:
        fitting = f"{gpus // per_node * per_node} or {(gpus // per_node + 1) * per_node}"
        message = f"does not fill nodes of {per_node} GPUs (cluster.train.gpus_per_node). Use {fitting}"
        yield Problem("cluster.gpus", gpus, message)
    else:
        train.nodes, local = max(1, gpus // per_node), min(gpus, per_node)
        train.ranks_per_node = train.gpus_per_node = local


def _partition(config: Config) -> Iterator[Problem]:
    partition = config.cluster.partition
    if partition is None:
        return
    if config.cluster.executor is Executor.local:
        message = "has no effect, because cluster=local does not use Slurm. Use cluster=slurm, or remove it"
        yield Problem("cluster.partition", partition, message)
        return
    for name in SECTIONS:
        section = getattr(config.cluster, name)
        if section.partition not in (None, partition):
            message = f"cluster.partition={partition} sets it too. Remove one of them, or set cluster.{name}.partition={partition}"
            yield Problem(f"cluster.{name}.partition", section.partition, message)
        section.partition = partition
