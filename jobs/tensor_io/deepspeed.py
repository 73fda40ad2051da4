"""DeepSpeed's ZeRO-1, 2 and 3 checkpoints: where the fp32 masters of every rank lie, and apart from them the optimizer's state."""

import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError
from jobs.tensor_io import safe_pickle
from jobs.tensor_io.layout import Extent, Stored
from jobs.tensor_io.safe_pickle import Saved


@dataclass(frozen=True)
class Flat:
    """One rank's tensor, in one file."""

    path: str
    saved: Saved


def tensors(folder: Path) -> dict[str, Stored]:
    """Every weight by its name in training: fp32 masters, frozen parameters, buffers, and shared ones under both names.

    Raises RunError when a rank's file is missing or damaged.
    """
    optimizers, models = _files(folder, "*_optim_states.pt"), _files(folder, "*_model_states.pt")
    states = [_load(path, "optimizer_state_dict") for path in optimizers]
    stage = int(states[0].get("zero_stage", 1))  # BF16_Optimizer's files have none, and look like ZeRO-1's
    _all_ranks(folder, optimizers, states[0])
    if stage == 3:
        _same(folder, models, optimizers)
    about = _load(models[0])
    flats = _flats(optimizers, states, "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups")
    found = _buffers(str(models[0]), about)
    if stage == 3:
        found |= _frozen3(models, about)
        found |= _sharded3(folder, flats, about["param_shapes"])
    else:
        found |= _frozen(str(models[0]), about)
        found |= _sharded(folder, flats, about["param_shapes"], states[0].get("param_alignment_paddings"))
    for name, kept in dict(about.get("shared_params") or {}).items():
        if kept in found:
            found[name] = found[kept]
    return found


def optimizer(folder: Path) -> dict[str, dict[str, Stored]]:
    """Of each trained weight by its name in training, what the optimizer keeps: exp_avg, exp_avg_sq, step and the like.

    What is as long as the masters is laid out as they are; a scalar counts for all of a rank's weights, and for all ranks.
    Raises RunError for state of other shapes: nobody can say which of it belongs to which weight.
    """
    paths = _files(folder, "*_optim_states.pt")
    states = [_load(path, "optimizer_state_dict") for path in paths]
    stage3 = int(states[0].get("zero_stage", 1)) == 3
    groups = _load(_files(folder, "*_model_states.pt")[0], "param_shapes")
    inner = [state["optimizer_state_dict" if stage3 else "base_optimizer_state"]["state"] for state in states]
    found: dict[str, dict[str, Stored]] = {name: {} for shapes in groups for name in shapes}
    for kind, value in inner[0][0].items():
        if isinstance(value, Saved) and value.shape == ():
            laid = dict.fromkeys(found, _whole(str(paths[0]), value))
        else:
            flats = [_kept(path, state, kind) for path, state in zip(paths, inner, strict=True)]
            paddings = states[0].get("param_alignment_paddings")
            laid = _sharded3(folder, flats, groups) if stage3 else _sharded(folder, flats, groups, paddings)
        for name, place in laid.items():
            found[name][kind] = place
    return found


def _kept(path: Path, state: dict[int, Any], kind: str) -> list[Flat]:
    """One rank's state of a kind, in the order of its groups."""
    values = [state[number].get(kind) for number in sorted(state)]
    if not all(isinstance(value, Saved) and value.contiguous and len(value.shape) == 1 for value in values):
        said = f"has {kind} in another shape than the weights: resume with the layout and ranks that wrote it"
        raise RunError(Problem("checkpoint", path, said))
    return [Flat(str(path), value) for value in values]


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    if not found:
        raise RunError(Problem("checkpoint", folder, f"has no {pattern}: it was not written to its end"))
    return found


def _load(path: Path, key: str | None = None) -> Any:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = safe_pickle.archive(descriptor, str(path))
    finally:
        os.close(descriptor)
    return found if key is None else found[key]


def _all_ranks(folder: Path, found: list[Path], state: dict[str, Any]) -> None:
    """DeepSpeed numbers the files by rank; the count of partitions says how many there must be."""
    count = state["partition_count"]
    count = max(count) if isinstance(count, list) else count
    names = {path.name for path in found}
    example = found[0].name
    expected = [re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank}", example) for rank in range(count)]
    if missing := [name for name in expected if name not in names]:
        said = f"is missing, {len(missing)} of {count} ranks' files are: copy them too, or merge another step"
        raise RunError(Problem("checkpoint", folder / missing[0], said))
    if len(found) > count:
        said = f"has {len(found)} such files for {count} ranks: files of another checkpoint are among them"
        raise RunError(Problem("checkpoint", folder, said))


def _same(folder: Path, models: list[Path], optimizers: list[Path]) -> None:
    names = {path.name for path in models}
    for path in optimizers:
        if (name := path.name.removeprefix("bf16_").replace("optim_states", "model_states")) not in names:
            raise RunError(Problem("checkpoint", folder / name, "is missing: copy it too, or merge another step"))


def _flats(paths: list[Path], states: list[dict[str, Any]], key: str) -> list[list[Flat]]:
    """[rank][group] of the masters. Raises RunError where one is not a plain run of numbers."""
    found = []
    for path, state in zip(paths, states, strict=True):
        groups = state.get(key)
        if groups is None:
            raise RunError(Problem("checkpoint", path, f"has no {key}: ZeRO's fp32 weights are not in it"))
        groups = groups if isinstance(groups, list | tuple) else [groups]
        if not all(isinstance(group, Saved) and group.contiguous for group in groups):
            raise RunError(Problem("checkpoint", path, f"{key} is not stored in the file (swapped to NVMe?)"))
        found.append([Flat(str(path), group) for group in groups])
    return found


def _buffers(path: str, about: dict[str, Any]) -> dict[str, Stored]:
    names = set(about.get("buffer_names") or ())
    return {
        name: _whole(path, saved)
        for name, saved in (about.get("module") or {}).items()
        if name in names and isinstance(saved, Saved)
    }


def _whole(path: str, saved: Saved, shape: Any = None) -> Stored:
    return Stored(tuple(saved.shape if shape is None else shape), saved.dtype, (_run(path, saved, 0, 0, saved.numel),))


def _run(path: str, saved: Saved, first: int, row: int, count: int) -> Extent:
    """`count` elements from the `first` of a saved tensor on, as the flat elements from `row` on."""
    return Extent(path, saved.offset + first * saved.dtype.itemsize, row, count)


def _frozen(path: str, about: dict[str, Any]) -> dict[str, Stored]:
    shapes, fragments = about.get("frozen_param_shapes") or {}, about.get("frozen_param_fragments") or {}
    return {name: _whole(path, fragments[name], shape) for name, shape in shapes.items()}


def _frozen3(models: list[Path], about: dict[str, Any]) -> dict[str, Stored]:
    """Each rank's model file holds its part of every frozen parameter; the last part is padded."""
    shapes = about.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    ranks = [_load(path, "frozen_param_fragments") for path in models]
    found = {}
    for name, shape in shapes.items():
        parts = [Flat(str(path), rank[name]) for path, rank in zip(models, ranks, strict=True)]
        found[name] = _joined(parts, [0] * len(parts), [part.saved.numel for part in parts], tuple(shape))
    return found


def _joined(parts: list[Flat], firsts: list[int], counts: list[int], shape: tuple[int, ...]) -> Stored:
    """A tensor laid end to end from its parts, without the padding behind it."""
    numel, row, extents = prod(shape), 0, []
    for part, first, count in zip(parts, firsts, counts, strict=True):
        if (count := min(count, numel - row)) > 0:
            extents.append(_run(part.path, part.saved, first, row, count))
            row += count
    return Stored(shape, parts[0].saved.dtype, tuple(extents))


def _sharded(folder: Path, flats: list[list[Flat]], groups: list[Any], paddings: Any) -> dict[str, Stored]:
    """ZeRO-1 and 2: a group is one flat vector, laid over the ranks end to end; padding stands behind the last parameter."""
    found = {}
    for number, shapes in enumerate(groups):
        ranks = [rank[number] for rank in flats]
        sizes = [part.saved.numel for part in ranks]
        at = 0
        for index, (name, shape) in enumerate(shapes.items()):
            found[name] = _slice(ranks, sizes, at, tuple(shape))
            at += prod(shape) + (paddings[number][index] if paddings else 0)
        if not at <= sum(sizes) < at + 2 * len(ranks):  # DeepSpeed pads to a multiple of twice the ranks
            _unfit(folder, at, sum(sizes))
    return found


def _slice(ranks: list[Flat], sizes: list[int], at: int, shape: tuple[int, ...]) -> Stored:
    extents, row, begin, numel = [], 0, 0, prod(shape)
    for part, size in zip(ranks, sizes, strict=True):
        first, last = max(at, begin), min(at + numel, begin + size)
        if first < last:
            extents.append(_run(part.path, part.saved, first - begin, row, last - first))
            row += last - first
        begin += size
    return Stored(shape, ranks[0].saved.dtype, tuple(extents))


def _sharded3(folder: Path, flats: list[list[Flat]], groups: list[Any]) -> dict[str, Stored]:
    """ZeRO-3: every parameter is cut into equal parts, one a rank; a rank's parts follow each other over its sub-groups."""
    shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    sizes = [group.saved.numel for group in flats[0]]
    found, at = {}, 0
    for name, shape in shapes.items():
        part = -(-prod(shape) // len(flats))
        runs = [run for rank in flats for run in _across(rank, sizes, at, part)]
        found[name] = _joined([run[0] for run in runs], [run[1] for run in runs], [run[2] for run in runs], shape)
        at += part
    if at != sum(sizes):
        _unfit(folder, at, sum(sizes))
    return found


def _across(rank: list[Flat], sizes: list[int], at: int, count: int) -> list[tuple[Flat, int, int]]:
    """(group, first element, count) of the elements `at` to `at + count` of a rank, which may span sub-groups."""
    found, begin = [], 0
    for group, size in zip(rank, sizes, strict=True):
        first, last = max(at, begin), min(at + count, begin + size)
        if first < last:
            found.append((group, first - begin, last - first))
        begin += size
    return found


def _unfit(folder: Path, needed: int, there: int) -> None:
    raise RunError(
        Problem("checkpoint", folder, f"holds {there} numbers a rank where its parameters take {needed}: not ZeRO's")
    )
