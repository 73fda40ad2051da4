"""Decides whether an output head that config.json ties to the embedding is still the same weight after training."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jobs.consolidation.weight_names import Blueprint, CheckpointNames
from jobs.model.saved_names import SavedName
from jobs.tensor_io.layout import StoredTensor, blocks
from jobs.tensor_io.reader import CHUNK, OpenFiles, Reader

if TYPE_CHECKING:
    from jobs.consolidation.adapter_layers import AdapterPlan

log = logging.getLogger(__name__)


def separate_tied(
    blueprint: Blueprint,
    names: CheckpointNames,
    weights: dict[str, StoredTensor],
    base: dict[str, StoredTensor],
    adapter: "AdapterPlan | None",
) -> tuple[list[SavedName], set[str]]:
    """Give both names of each tied weight their source in `names.whole`, as far as the checkpoint has it.

    Returns the second names that need a tensor of their own, and the names of the checkpoint that hold a weight a second time.
    PEFT unties what it trains: a copy of the head or the embedding (modules_to_save), or an adapter on one of them.
    """
    changed: set[str] = set()
    if adapter is not None and not adapter.keeps_ties:
        changed = set(adapter.trained) | {layer.weight for layer in adapter.layers.values()}
    untied, spare, whole = [], set(), names.whole
    for second, first in blueprint.tied.items():
        if {first, second} & changed:
            _fill_from_other(names, first, second, adapter)
            _fill_from_other(names, second, first, adapter)
            reason = "the adapter changes one of them"
        else:
            both = [{name: weights[key] for name, key in whole.items() if name in (first, second)}, base]
            reason = _reason_to_untie(first, second, both[0] or both[1])
        if reason:
            untied.append(SavedName(second, blueprint.live[first], second))
            log.info(f"{second} is a weight of its own, not tied to {first}: {reason}")
        elif second in whole:
            key = whole.pop(second)
            if whole.setdefault(first, key) != key:
                spare.add(key)
    return untied, spare


def _reason_to_untie(first: str, second: str, stored: Mapping[str, StoredTensor]) -> str:
    """Why two names are not one weight; empty if they are. Files may hold both, and they should be equal then."""
    if first not in stored or second not in stored or stored_equal(stored[first], stored[second]):
        return ""
    return "two different weights are stored"


def _fill_from_other(names: CheckpointNames, name: str, other: str, adapter: "AdapterPlan | None") -> None:
    """Take the frozen weight of `name` from where the checkpoint has it: the copy that PEFT keeps, or the other name."""
    if name in names.whole:
        return
    for found in (name, other):
        if found in names.originals:
            names.whole[name] = names.originals[found]
            return
    if other in names.whole and adapter is not None and other not in adapter.trained:
        names.whole[name] = names.whole[other]


def stored_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors have the same bytes. Reads both, unless they lie in the same place or differ early."""
    if one == other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    files = OpenFiles()
    reader, width = Reader(files), max(one.width, other.width)
    try:
        for start, stop in blocks(0, one.numel, width, CHUNK // max(1, one.dtype.itemsize)):
            parts = [np.empty((stop - start) * one.dtype.itemsize, np.uint8) for _ in range(2)]
            reader.fill(one, start, parts[0])
            reader.fill(other, start, parts[1])
            if not np.array_equal(parts[0], parts[1]):
                return False
    finally:
        files.close()
    return True
