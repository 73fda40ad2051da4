"""Decides which tensors the result has, and what each is made of: a weight of the checkpoint or of the base, plus an adapter."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from conf.errors import DataError, Problem
from jobs.consolidation.plan import Output
from jobs.consolidation.weight_names import Blueprint, SavedName, split_adapters
from jobs.tensor_io.dtypes import Dtype, as_tensor
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.reader import OpenFiles, Reader

if TYPE_CHECKING:  # both are imported only if there is an adapter
    import torch

    from jobs.consolidation.lora import LoraUpdate

Adapters = dict[str, dict[str, str]]
"""Live name -> kind (lora_A, lora_B, ...) -> name in the checkpoint."""
BASE = "base:"
"""Put before the names of the base's weights, because the checkpoint may have a weight of the same name."""
MAX_LISTED = 3


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter is scaled; fields as in adapter_config.json."""

    alpha: float = 1.0
    rslora: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression of module names -> alpha, if it is not the same for all."""

    def scale(self, weight: str, rank: int) -> float:
        """The factor of B @ A for an adapter of this rank on `weight`, a live name."""
        from jobs.consolidation.lora import scale

        module = weight.removesuffix(".weight")
        matching = (alpha for key, alpha in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module))
        return scale(next(matching, self.alpha), rank, self.rslora)


@dataclass
class Merge:
    """Everything that a plan needs: the outputs, their sources, and what is added to which source."""

    outputs: list[Output]
    sources: dict[str, StoredTensor]
    updates: "dict[str, LoraUpdate]" = field(default_factory=dict)
    nf4_sources: dict[str, Dtype] = field(default_factory=dict)
    """Source -> compute dtype of training, for sources that are rounded to NF4 as training had them."""
    untied: bool = False
    """Whether a tied head was trained separately, so that the config of the result must untie it."""

    def main_dtype(self) -> Dtype:
        """The dtype of most bytes."""
        sizes: dict[Dtype, int] = {}
        for output in self.outputs:
            sizes[output.dtype] = sizes.get(output.dtype, 0) + output.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def merge_without_base(weights: dict[str, StoredTensor], dtype: Dtype | None) -> Merge:
    """Every weight under its own name, if no model is given to compare with. Raises DataError if there are adapters."""
    _, adapters = split_adapters(weights)
    if adapters:
        message = f"{len(adapters)} weights have adapters: name the model that the adapters were trained on"
        raise DataError(Problem("--base", None, message))
    outputs = [Output(key, stored.shape, _output_dtype(stored, dtype), key) for key, stored in weights.items()]
    return Merge(outputs, weights)


def merge_model(
    blueprint: Blueprint,
    weights: dict[str, StoredTensor],
    base: dict[str, StoredTensor],
    dtype: Dtype | None,
    settings: AdapterSettings | None,
) -> Merge:
    """Every tensor of the model folder, in `dtype`; None keeps the dtype that each weight has in `base`.

    Raises DataError if a weight is missing, unknown to the model or of another shape.
    """
    keys, adapters = split_adapters(weights)
    keys, untied = _without_tied_names(blueprint, keys, weights)
    sources = {**weights, **{BASE + name: stored for name, stored in base.items()}}
    merge = Merge([], sources, untied=bool(untied))
    known = blueprint.live.keys() | blueprint.tied.keys()
    wrong = sorted(name for name in [*keys, *adapters] if name not in known)
    missing = []
    for saved in [*blueprint.saved, *untied]:
        source = _find_source(saved, blueprint, keys, base)
        if source is None:
            missing.append(saved.name)
            continue
        stored = sources[source.name]
        if stored.shape != source.shape:
            label = source.name.removeprefix(BASE) if source.name.startswith(BASE) else saved.live
            wrong.append(f"{label} {list(stored.shape)} instead of {list(source.shape)}")
            continue
        in_base = base.get(blueprint.base_name(saved, base) or "", stored)
        output_dtype = _output_dtype(in_base, dtype)
        merge.outputs.append(Output(saved.name, saved.shape, output_dtype, source.name, source.start))
    if missing or wrong:
        message = (
            f"does not fit the model: missing {missing[:MAX_LISTED]}, unknown or of another shape {wrong[:MAX_LISTED]}"
        )
        remedy = "name the model that was trained (model.source, --base)"
        raise DataError(Problem("checkpoint", None, f"{message}; {remedy}"))
    if adapters:
        _add_adapters(merge, blueprint, keys, adapters, settings or AdapterSettings())
    return merge


def use_dequantized_base(merge: Merge, blueprint: Blueprint, layers: Iterable[str], compute_dtype: Dtype) -> None:
    """Round the base weights of `layers` (live names) to NF4, as training had them."""
    base = {key.removeprefix(BASE) for key in merge.sources if key.startswith(BASE)}
    for saved in blueprint.saved:
        if saved.live in layers:
            merge.nf4_sources[BASE + str(blueprint.base_name(saved, base))] = compute_dtype


def merge_adapter_only(weights: dict[str, StoredTensor], dtype: Dtype | None) -> Merge:
    """The adapters, and the modules that PEFT trained whole, under PEFT's names in files. Raises DataError if there are none."""
    keys, adapters = split_adapters(weights)
    if not adapters:
        message = "this checkpoint has no adapters: remove it, or name the checkpoint of a run with an adapter"
        raise DataError(Problem("consolidate.adapter_only", True, message))
    wanted = [key for kinds in adapters.values() for key in kinds.values()]
    wanted += [key for key in keys.values() if ".modules_to_save." in key]
    outputs = []
    for key in wanted:
        name = f"base_model.model.{_ADAPTER_NAME.sub('', key.removeprefix('base_model.model.'))}"
        outputs.append(Output(name, weights[key].shape, _output_dtype(weights[key], dtype), key))
    return Merge(outputs, weights)


_ADAPTER_NAME = re.compile(
    r"(?<=lora_[AB])\.default|(?<=lora_magnitude_vector)\.default(\.weight)?|\.modules_to_save\.default"
    r"|(?<=lora_embedding_[AB])\.default"
)
"""The name of the adapter (`default`), which PEFT leaves out of the names in adapter_model.safetensors."""


def _output_dtype(stored: StoredTensor, dtype: Dtype | None) -> Dtype:
    """Integers and booleans keep their dtype."""
    return stored.dtype if dtype is None or not stored.dtype.is_floating_point else dtype


def _without_tied_names(
    blueprint: Blueprint, keys: dict[str, str], weights: dict[str, StoredTensor]
) -> tuple[dict[str, str], list[SavedName]]:
    """`keys` without the second names of tied weights, and the weights that are no longer tied.

    A weight under its second name is used if it has none under the first. If PEFT trained a tied head separately
    (modules_to_save), it is a weight of its own.
    """
    remaining, untied = {}, []
    for name, key in keys.items():
        first = blueprint.tied.get(name)
        if first is None:
            remaining[name] = key
        elif ".modules_to_save." in key:
            remaining[name] = key
            untied.append(SavedName(name, weights[key].shape, name))
        elif first not in keys:
            remaining.setdefault(first, key)
    return remaining, untied


class _Source(NamedTuple):
    name: str
    shape: tuple[int, ...]
    """Expected by the model."""
    start: int
    """First element of the output in it."""


def _find_source(
    saved: SavedName, blueprint: Blueprint, keys: dict[str, str], base: dict[str, StoredTensor]
) -> _Source | None:
    """The weight of the checkpoint, or else of the base, that has the elements of a tensor."""
    if saved.live in keys:
        return _Source(keys[saved.live], blueprint.live.get(saved.live, saved.shape), saved.start)
    name = blueprint.base_name(saved, base)
    return _Source(BASE + name, saved.shape, 0) if name else None


def _add_adapters(
    merge: Merge, blueprint: Blueprint, keys: dict[str, str], adapters: Adapters, settings: AdapterSettings
) -> None:
    """Read the adapters, which are small, and give every source its own rows of them. Raises DataError if one does not fit."""
    base = {key.removeprefix(BASE) for key in merge.sources if key.startswith(BASE)}
    for name, parts in _read_adapters(merge.sources, adapters).items():
        update = _make_update(name, parts, name in blueprint.transposed, settings)
        rows, columns = blueprint.live[name]
        if (update.b.shape[0], update.a.shape[1]) != (rows, columns):
            size = f"{update.b.shape[0]} x {update.a.shape[1]}"
            message = f"{name} is {rows} x {columns}, but its adapter {size}: was it trained on another base?"
            raise DataError(Problem("model.source", None, message))
        if name in keys:
            merge.updates[keys[name]] = update
            continue
        for saved in blueprint.saved:  # the files of a base may have a fused weight in several tensors
            if saved.live == name:
                key = BASE + str(blueprint.base_name(saved, base))
                merge.updates[key] = _rows_of_update(update, saved.start // columns, saved.shape[0])


def _read_adapters(sources: dict[str, StoredTensor], adapters: Adapters) -> "dict[str, dict[str, torch.Tensor]]":
    files = OpenFiles()
    reader = Reader(files)
    try:
        return {
            name: {kind: read_tensor(reader, sources[key]) for kind, key in kinds.items()}
            for name, kinds in adapters.items()
        }
    finally:
        files.close()


def _rows_of_update(update: "LoraUpdate", first: int, count: int) -> "LoraUpdate":
    from jobs.consolidation.lora import LoraUpdate

    magnitude = None if update.magnitude is None else update.magnitude[first : first + count]
    return LoraUpdate(update.a, update.b[first : first + count], update.scale, magnitude)


def _make_update(
    name: str, parts: "dict[str, torch.Tensor]", transposed: bool, settings: AdapterSettings
) -> "LoraUpdate":
    from jobs.consolidation.lora import LoraUpdate

    is_embedding = "lora_embedding_A" in parts
    kind_a, kind_b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    if missing := [kind for kind in (kind_a, kind_b) if kind not in parts]:
        message = f"has no {missing[0]} for the adapter of {name}: save the adapter again, or merge another step"
        raise DataError(Problem("checkpoint", None, message))
    a, b = parts[kind_a], parts[kind_b]
    update = LoraUpdate(a, b, settings.scale(name, a.shape[0]), parts.get("lora_magnitude_vector"))
    return update.transposed() if is_embedding or transposed else update


def read_tensor(reader: Reader, stored: StoredTensor) -> "torch.Tensor":
    """A whole stored tensor in fp32, for small ones."""
    flat = np.empty(stored.nbytes, np.uint8)
    reader.fill(stored, 0, flat)
    return as_tensor(flat, stored.dtype).view(stored.shape).float()
