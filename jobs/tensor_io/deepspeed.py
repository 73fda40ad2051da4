"""Finds the fp32 weights and the optimizer state of DeepSpeed checkpoints (ZeRO-1, 2 and 3) in the files of all ranks.

DeepSpeed flattens parameters into groups, one per parameter group of the optimizer, and cuts each group into one part per rank:

- ZeRO-1 and 2 concatenate the parameters of a group and cut the result into equal parts. A parameter may span two ranks.
- ZeRO-3 cuts every parameter into equal parts. A rank's part of the group has its parts of all parameters, end to end.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import Problem, RunError
from jobs.tensor_io import deepspeed_files
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import Extent, StoredTensor
from jobs.tensor_io.safe_pickle import SavedTensor
from jobs.tensor_io.untrusted import is_plain_name


@dataclass(frozen=True)
class FlatPart:
    """One rank's flat part of a group or parameter, and the file that holds it."""

    path: str
    saved: SavedTensor


class ElementRange(NamedTuple):
    """Contiguous elements of one rank's file."""

    part: FlatPart
    first: int
    numel: int


Shapes = list[dict[str, Any]]
"""For each parameter group: name -> shape, in the order in which they were flattened."""


class Weights(NamedTuple):
    tensors: dict[str, StoredTensor]
    """By the names in training: fp32 weights, frozen parameters, buffers, and shared weights under both names."""
    excludes_frozen: bool
    """Whether it was saved without its frozen parameters (`exclude_frozen_parameters`, as the Trainer does with PEFT)."""
    compute_dtype: Dtype | None
    """In which the engine had its parameters, frozen ones included."""


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every weight by its name in training; see `find_weights`."""
    return find_weights(folder).tensors


def find_weights(folder: Path) -> Weights:
    """Every weight of a checkpoint. Raises RunError if the file of a rank is missing or damaged, or for a model cut in itself."""
    model_paths = deepspeed_files.files(folder, "*_model_states.pt")
    deepspeed_files.check_not_model_parallel(folder, model_paths)
    model_state = deepspeed_files.load(model_paths[0])
    if (folder / "zero").is_dir():
        return _universal(folder, model_paths, model_state)
    if not any(folder.glob("*_optim_states.pt")) and deepspeed_files.stage_of_config(model_state) == 0:
        return Weights(_whole_module(str(model_paths[0]), model_state), True, _compute_dtype(model_state))
    optimizer_paths = deepspeed_files.files(folder, "*_optim_states.pt")
    states = [deepspeed_files.load(path, "optimizer_state_dict") for path in optimizer_paths]
    stage = int(states[0].get("zero_stage", 1))  # BF16_Optimizer writes none, and its files are laid out like ZeRO-1's
    deepspeed_files.check_ranks(folder, optimizer_paths, states[0])
    if stage == 3:
        deepspeed_files.check_model_files(folder, model_paths, optimizer_paths)
    shapes = _shapes(model_paths[0], model_state)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    parts = _parts_of_ranks(optimizer_paths, states, key)
    weights = _buffers(str(model_paths[0]), model_state)
    if stage == 3:
        weights |= _frozen_sharded(model_paths, model_state)
        weights |= _zero3_parameters(folder, parts, shapes)
    else:
        weights |= _frozen_whole(str(model_paths[0]), model_state)
        weights |= _zero12_parameters(folder, parts, shapes, states[0].get("param_alignment_paddings"))
    weights |= _shared(weights, model_state)
    if stage < 3:  # ZeRO-1 writes frozen parameters among the module's only, which has every parameter whole
        weights = _whole_module(str(model_paths[0]), model_state) | weights
    excludes_frozen = stage < 2 or model_state.get("frozen_param_shapes") is None
    return Weights(weights, excludes_frozen, _compute_dtype(model_state))


def _universal(folder: Path, model_paths: list[Path], model_state: dict[str, Any]) -> Weights:
    """A universal checkpoint: a folder for each trained weight, with the whole of it in `fp32.pt`, flat if it comes from ZeRO-3."""
    weights = _whole_module(str(model_paths[0]), model_state)
    weights = {name: stored for name, stored in weights.items() if stored.numel} | _frozen_sharded_or_whole(
        model_paths, model_state
    )
    shapes = {name: tuple(shape) for group in _shapes(model_paths[0], model_state) for name, shape in group.items()}
    for name, shape in shapes.items():
        path = folder / "zero" / name / "fp32.pt"
        if not is_plain_name(name):
            raise RunError(Problem("checkpoint", model_paths[0], f"names a weight {name:.200}, which is a path"))
        if not path.is_file():
            message = "is missing: convert the checkpoint again, or copy this file too"
            raise RunError(Problem("checkpoint", path, message))
        content = deepspeed_files.load(path)
        saved = content["param"] if isinstance(content, dict) else content
        if not isinstance(saved, SavedTensor) or not saved.contiguous or saved.numel < prod(shape):
            raise RunError(Problem("checkpoint", path, f"does not hold the {list(shape)} numbers of {name}"))
        weights[name] = _whole(str(path), saved, shape)
    weights |= _shared(weights, model_state)
    return Weights(weights, True, _compute_dtype(model_state))


def _shared(weights: dict[str, StoredTensor], model_state: dict[str, Any]) -> dict[str, StoredTensor]:
    """Second names of weights."""
    names = dict(model_state.get("shared_params") or {})
    return {name: weights[stored_name] for name, stored_name in names.items() if stored_name in weights}


def _shapes(path: Path, model_state: dict[str, Any]) -> Shapes:
    if not (shapes := model_state.get("param_shapes")):
        message = "does not list its parameters (param_shapes): save it with ZeRO 1, 2 or 3"
        raise RunError(Problem("checkpoint", path, message))
    return list(shapes)


def _frozen_sharded_or_whole(model_paths: list[Path], model_state: dict[str, Any]) -> dict[str, StoredTensor]:
    """ZeRO-3 has a model file for each rank, ZeRO-1 and 2 have one."""
    if model_paths[0].name.startswith("zero_pp_rank"):
        return _frozen_sharded(model_paths, model_state)
    return _frozen_whole(str(model_paths[0]), model_state)


def _compute_dtype(model_state: dict[str, Any]) -> Dtype | None:
    names = {name for group in model_state.get("param_shapes") or [] for name in group}
    module = model_state.get("module") or {}
    dtypes = {saved.dtype for name, saved in module.items() if isinstance(saved, SavedTensor) and name in names}
    return dtypes.pop() if len(dtypes) == 1 else None


def _whole_module(path: str, model_state: dict[str, Any]) -> dict[str, StoredTensor]:
    """What the model file holds whole, in the precision of compute."""
    module = model_state.get("module") or {}
    found = {name: saved for name, saved in module.items() if isinstance(saved, SavedTensor)}
    if bad := sorted(name for name, saved in found.items() if not saved.contiguous):
        raise RunError(Problem("checkpoint", path, f"stores {bad[0]} in strides: save it again, contiguous"))
    return {name: _whole(path, saved) for name, saved in found.items()}


def find_optimizer_state(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Name of each trained weight -> kind of state (exp_avg, exp_avg_sq, step, ...) -> where it is stored.

    State that is as long as the flat fp32 weights has their layout. A scalar is the same for all weights and ranks.
    Raises RunError for state of any other shape: it cannot be assigned to weights.
    """
    paths = deepspeed_files.files(folder, "*_optim_states.pt")
    states = [deepspeed_files.load(path, "optimizer_state_dict") for path in paths]
    is_zero3 = int(states[0].get("zero_stage", 1)) == 3
    shapes: Shapes = deepspeed_files.load(deepspeed_files.files(folder, "*_model_states.pt")[0], "param_shapes")
    inner = [state["optimizer_state_dict" if is_zero3 else "base_optimizer_state"]["state"] for state in states]
    state_of_weight: dict[str, dict[str, StoredTensor]] = {name: {} for group in shapes for name in group}
    for kind, value in inner[0][0].items():
        if isinstance(value, SavedTensor) and value.shape == ():
            laid_out = dict.fromkeys(state_of_weight, _whole(str(paths[0]), value))
        else:
            parts = [_state_parts(path, state, kind) for path, state in zip(paths, inner, strict=True)]
            if is_zero3:
                laid_out = _zero3_parameters(folder, parts, shapes)
            else:
                laid_out = _zero12_parameters(folder, parts, shapes, states[0].get("param_alignment_paddings"))
        for name, stored in laid_out.items():
            state_of_weight[name][kind] = stored
    return state_of_weight


def _state_parts(path: Path, state: dict[int, Any], kind: str) -> list[FlatPart]:
    """One rank's optimizer state of a kind, one part per group."""
    values = [state[number].get(kind) for number in sorted(state)]
    if not all(isinstance(value, SavedTensor) and value.contiguous and len(value.shape) == 1 for value in values):
        message = f"has {kind} in another shape than the weights: resume with the layout and ranks that wrote it"
        raise RunError(Problem("checkpoint", path, message))
    return [FlatPart(str(path), value) for value in values]


def _parts_of_ranks(paths: list[Path], states: list[dict[str, Any]], key: str) -> list[list[FlatPart]]:
    """[rank][group] of the fp32 weights. Raises RunError if one is not stored as plain numbers."""
    parts = []
    for path, state in zip(paths, states, strict=True):
        groups = state.get(key)
        if groups is None:
            raise RunError(Problem("checkpoint", path, f"has no {key}: it does not contain ZeRO's fp32 weights"))
        groups = groups if isinstance(groups, list | tuple) else [groups]
        if not all(isinstance(group, SavedTensor) and group.contiguous for group in groups):
            raise RunError(Problem("checkpoint", path, f"does not contain {key} (swapped to NVMe?)"))
        parts.append([FlatPart(str(path), group) for group in groups])
    return parts


def _buffers(path: str, model_state: dict[str, Any]) -> dict[str, StoredTensor]:
    names = set(model_state.get("buffer_names") or ())
    return {
        name: _whole(path, saved)
        for name, saved in (model_state.get("module") or {}).items()
        if name in names and isinstance(saved, SavedTensor)
    }


def _whole(path: str, saved: SavedTensor, shape: Any = None) -> StoredTensor:
    """A tensor that one file holds completely, perhaps with padding after it."""
    shape = tuple(saved.shape if shape is None else shape)
    return StoredTensor(shape, saved.dtype, (_extent(FlatPart(path, saved), 0, 0, prod(shape)),))


def _extent(part: FlatPart, first: int, row: int, count: int) -> Extent:
    """`count` elements of a part from `first` on; in the tensor they are the flat elements from `row` on.

    Raises RunError for elements that the part does not have, or that do not follow each other in the file.
    """
    if not part.saved.contiguous or not 0 <= first <= first + count <= part.saved.numel:
        message = f"stores {list(part.saved.shape)} with strides or for another shape: save it again, contiguous"
        raise RunError(Problem("checkpoint", part.path, message))
    return Extent(part.path, part.saved.offset + first * part.saved.dtype.itemsize, row, count)


def _frozen_whole(path: str, model_state: dict[str, Any]) -> dict[str, StoredTensor]:
    """ZeRO-1 and 2: frozen parameters are whole in the model file."""
    shapes = model_state.get("frozen_param_shapes") or {}
    fragments = model_state.get("frozen_param_fragments") or {}
    return {name: _whole(path, fragments[name], shape) for name, shape in shapes.items()}


def _frozen_sharded(model_paths: list[Path], model_state: dict[str, Any]) -> dict[str, StoredTensor]:
    """ZeRO-3: the model file of each rank holds its part of every frozen parameter; the last part is padded."""
    shapes = model_state.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    fragments_of_ranks = [deepspeed_files.load(path, "frozen_param_fragments") for path in model_paths]
    parameters = {}
    for name, shape in shapes.items():
        pairs = zip(model_paths, fragments_of_ranks, strict=True)
        parts = [FlatPart(str(path), fragments[name]) for path, fragments in pairs]
        ranges = [ElementRange(part, 0, part.saved.numel) for part in parts]
        parameters[name] = _joined(ranges, tuple(shape), parts[0].saved.dtype)
    return parameters


def _joined(ranges: list[ElementRange], shape: tuple[int, ...], dtype: Dtype) -> StoredTensor:
    """A tensor that is the concatenation of ranges, without the padding after its last element."""
    numel, row, extents = prod(shape), 0, []
    for part, first, count in ranges:
        if (count := min(count, numel - row)) > 0:
            extents.append(_extent(part, first, row, count))
            row += count
    return StoredTensor(shape, dtype, tuple(extents))


def _zero12_parameters(
    folder: Path, parts: list[list[FlatPart]], groups: Shapes, paddings: Any
) -> dict[str, StoredTensor]:
    """ZeRO-1 and 2. `paddings`, if any, are elements after each parameter of each group."""
    parameters = {}
    for number, shapes in enumerate(groups):
        parts_of_group = [rank[number] for rank in parts]
        total, position = sum(part.saved.numel for part in parts_of_group), 0
        dtype = parts_of_group[0].saved.dtype
        for index, (name, shape) in enumerate(shapes.items()):
            parameters[name] = _joined(_element_ranges(parts_of_group, position, prod(shape)), tuple(shape), dtype)
            position += prod(shape) + (paddings[number][index] if paddings else 0)
        if not position <= total < position + 2 * len(parts_of_group):  # DeepSpeed pads to a multiple of 2 x ranks
            raise _wrong_size(folder, position, total)
    return parameters


def _zero3_parameters(folder: Path, parts: list[list[FlatPart]], groups: Shapes) -> dict[str, StoredTensor]:
    """ZeRO-3. A rank's part of a parameter may span two of its groups: DeepSpeed also cuts them into sub-groups."""
    shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    total, position, parameters = sum(part.saved.numel for part in parts[0]), 0, {}
    dtype = parts[0][0].saved.dtype
    for name, shape in shapes.items():
        count = -(-prod(shape) // len(parts))
        ranges = [item for rank in parts for item in _element_ranges(rank, position, count)]
        parameters[name] = _joined(ranges, shape, dtype)
        position += count
    if position != total:
        raise _wrong_size(folder, position, total)
    return parameters


def _element_ranges(parts: list[FlatPart], start: int, count: int) -> list[ElementRange]:
    """The elements `start` to `start + count` of the concatenated parts."""
    ranges, begin = [], 0
    for part in parts:
        first, last = max(start, begin), min(start + count, begin + part.saved.numel)
        if first < last:
            ranges.append(ElementRange(part, first - begin, last - first))
        begin += part.saved.numel
    return ranges


def _wrong_size(folder: Path, expected: int, actual: int) -> RunError:
    message = f"holds {actual} numbers where its parameters need {expected}: it was not written by DeepSpeed's ZeRO"
    return RunError(Problem("checkpoint", folder, message))
