"""Suggests the first change to a config, from the cheapest, with which training fits into the memory of a GPU; pure."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from conf.batch import micro_batch_limit
from conf.choices import Backend, Checkpointing
from conf.schema import Config
from launcher.estimate.memory import Loop, estimate
from launcher.estimate.table import GIB


@dataclass(frozen=True)
class Change:
    """One change to a config."""

    overrides: str
    """What the user types, for example `parallel=zero3`."""
    values: dict[str, Any]
    """Dotted keys of the config and the values that `overrides` gives them."""


@dataclass(frozen=True)
class Suggestion:
    """Changes with which training fits."""

    overrides: str
    device_bytes: float
    """Estimated memory per GPU with them."""


def first_that_fits(config: Config, capacity_gib: float, loop: Loop | None = None) -> Suggestion | None:
    """The first of the candidates whose estimate fits into `capacity_gib` GiB per GPU; None if none does."""
    for changes in _candidates(config):
        size = estimate(_changed(config, changes), loop)
        if size and size.device.total <= capacity_gib * GIB:
            return Suggestion(" ".join(change.overrides for change in changes), size.device.total)
    return None


def _changed(config: Config, changes: Sequence[Change]) -> Config:
    copy = deepcopy(config)
    for key, value in (item for change in changes for item in change.values.items()):
        *sections, name = key.split(".")
        target: Any = copy
        for section in sections:
            target = getattr(target, section)
        setattr(target, name, value)
    return copy


def _candidates(config: Config) -> Iterator[list[Change]]:
    """Changes to try, from the cheapest.

    One change alone: a layout that shards more, more nodes, more recomputation, a smaller micro batch. Then the strongest
    of these together. Shorter rows lose data and offload is slow, so they come last.
    """
    layouts, recomputation = list(_layouts(config)), list(_recomputation(config.train.activation_checkpointing))
    batches = list(_halved("train.micro_batch", micro_batch_limit(config), smallest=1))
    lengths = list(_halved("data.max_length", config.data.max_length, smallest=512))
    offload = _offload(config)
    yield from ([change] for change in (*layouts, *_more_nodes(config), *recomputation, *batches))

    most_recomputed, smallest_batch = recomputation[-1:], batches[-1:]
    sharded_and_recomputed = [*layouts[-1:], *most_recomputed]
    if sharded_and_recomputed:
        yield sharded_and_recomputed
    yield from ([*sharded_and_recomputed, batch] for batch in batches)
    yield from ([shorter] for shorter in lengths)
    yield from ([*sharded_and_recomputed, *smallest_batch, shorter] for shorter in lengths)
    yield [offload]
    yield [*most_recomputed, *smallest_batch, offload]  # no other layout: offload is one of its own


def _layouts(config: Config) -> Iterator[Change]:
    """Layouts of the same backend that shard more, or keep fewer gathered parameters."""
    if config.parallel.backend is Backend.zero:
        for stage in range(config.parallel.zero_stage + 1, 4):
            yield Change(f"parallel=zero{stage}", {"parallel.zero_stage": stage})
        return
    if config.parallel.shard_ranks != 1 and config.parallel.reshard_after_forward is False:
        yield Change("parallel.reshard_after_forward=true", {"parallel.reshard_after_forward": True})
    if config.parallel.shard_ranks is not None:
        values = {"parallel.shard_ranks": None, "parallel.reshard_after_forward": True}
        yield Change("parallel=fsdp", values)


def _more_nodes(config: Config) -> Iterator[Change]:
    """Two, four and eight times the nodes, where `train.global_batch` still divides over the ranks."""
    train = config.cluster.train
    for nodes in (2 * train.nodes, 4 * train.nodes, 8 * train.nodes):
        if config.train.global_batch % (nodes * train.ranks_per_node) == 0:
            yield Change(f"cluster.train.nodes={nodes}", {"cluster.train.nodes": nodes})


def _recomputation(mode: Checkpointing) -> Iterator[Change]:
    """Modes of activation checkpointing that keep less than `mode`, without host memory."""
    modes = [Checkpointing.none, Checkpointing.selective, Checkpointing.full]
    for other in modes[modes.index(mode) + 1 :] if mode in modes else []:
        overrides = f"train.activation_checkpointing={other.name}"
        yield Change(overrides, {"train.activation_checkpointing": other})


def _halved(key: str, value: int, smallest: int) -> Iterator[Change]:
    """`value` halved again and again, down to `smallest`."""
    while value // 2 >= smallest:
        value //= 2
        yield Change(f"{key}={value}", {key: value})


def _offload(config: Config) -> Change:
    """The layout of the same backend that keeps parameters and optimizer state in host memory."""
    values: dict[str, Any] = {"parallel.offload_optimizer": True, "parallel.offload_parameters": True}
    if config.parallel.backend is Backend.fsdp:
        values |= {"parallel.shard_ranks": None, "parallel.reshard_after_forward": True}
        return Change("parallel=fsdp_offload", values)
    return Change("parallel=zero3_offload", values | {"parallel.zero_stage": 3})
