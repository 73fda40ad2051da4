"""Names what would fit: the first change to a config, from the cheapest, that brings a GPU's estimate below its memory; pure."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from conf.batch import rows_at_once
from conf.choices import Backend, Checkpointing
from conf.schema import Config
from launcher.estimate.memory import Loop, estimate
from launcher.estimate.table import GIB, gib

Values = dict[str, Any]
"""Dotted keys of a config, with what they are set to."""


def that_fits(config: Config, capacity_gib: float, loop: Loop | None = None) -> str | None:
    """The first change, from the cheapest, with which the estimate fits into a GPU; None where none of them is enough."""
    for words, values in _changes(config):
        changed = deepcopy(config)
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            target: Any = changed
            for step in section.split("."):
                target = getattr(target, step)
            setattr(target, name, value)
        found = estimate(changed, loop)
        if found and found.device.total <= capacity_gib * GIB:
            return f"with {words} it would be {gib(found.device.total)} GiB"
    return None


def _changes(config: Config) -> Iterator[tuple[str, Values]]:
    """Words to type, with the values they set: a cheaper layout, more nodes, less at once; then several of them together.

    Shorter rows lose data, and offload is slow: these come last.
    """
    layouts, nodes, ranks = list(_layouts(config)), config.cluster.train.nodes, config.cluster.train.ranks_per_node
    yield from layouts
    for more in (2 * nodes, 4 * nodes, 8 * nodes):
        if config.train.global_batch % (more * ranks) == 0:
            yield f"cluster.train.nodes={more}", {"cluster.train.nodes": more}
    best = layouts[-1:]
    heavier = list(_recomputed(config.train.activation_checkpointing))
    yield from heavier
    best += heavier[-1:]
    batches = list(_halved("train.micro_batch", rows_at_once(config), least=1))
    lengths = list(_halved("data.max_length", config.data.max_length, least=512))
    yield from batches
    least = [*best, *batches[-1:]]
    spilled = [*least[len(layouts[-1:]) :], _offload_all(config)]  # a layout of its own
    together = [best, *([*best, batch] for batch in batches), *([shorter] for shorter in lengths)]
    together += [[*least, shorter] for shorter in lengths] + [spilled[-1:], spilled]
    for changes in filter(None, together):
        yield " ".join(words for words, _ in changes), dict(item for _, new in changes for item in new.items())


def _recomputed(mode: Checkpointing) -> Iterator[tuple[str, Values]]:
    """Modes of recomputation that keep less, on the GPU alone."""
    modes = [Checkpointing.none, Checkpointing.selective, Checkpointing.full]
    for other in modes[modes.index(mode) + 1 :] if mode in modes else []:
        yield f"train.activation_checkpointing={other.name}", {"train.activation_checkpointing": other}


def _halved(key: str, value: int, least: int) -> Iterator[tuple[str, Values]]:
    while value // 2 >= least:
        value //= 2
        yield f"{key}={value}", {key: value}


def _layouts(config: Config) -> Iterator[tuple[str, Values]]:
    """Layouts of the same backend that shard more, or hold less of it together."""
    if config.parallel.backend is Backend.zero:
        for stage in range(config.parallel.zero_stage + 1, 4):
            yield f"parallel=zero{stage}", {"parallel.zero_stage": stage}
        return
    if config.parallel.shard_ranks != 1 and config.parallel.reshard_after_forward is False:
        yield "parallel.reshard_after_forward=true", {"parallel.reshard_after_forward": True}
    if config.parallel.shard_ranks is not None:
        yield "parallel=fsdp", {"parallel.shard_ranks": None, "parallel.reshard_after_forward": True}


def _offload_all(config: Config) -> tuple[str, Values]:
    values: Values = {"parallel.offload_optimizer": True, "parallel.offload_parameters": True}
    if config.parallel.backend is Backend.fsdp:
        return "parallel=fsdp_offload", values | {"parallel.shard_ranks": None, "parallel.reshard_after_forward": True}
    return "parallel=zero3_offload", values | {"parallel.zero_stage": 3}
