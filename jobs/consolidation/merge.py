"""What each tensor of the result is made of: a weight of the checkpoint, one of the base, an adapter on top of either."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import DataError, Problem
from jobs.consolidation.plan import Output
from jobs.consolidation.weight_names import Blueprint, SavedName, adapters
from jobs.tensor_io import dtypes
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import Stored
from jobs.tensor_io.reader import Files, Reader

if TYPE_CHECKING:  # both are imported where there is an adapter
    import torch

    from jobs.consolidation.lora import Update

BASE = "base:"
"""Stands before the names of base weights, which may also be in the checkpoint."""


@dataclass(frozen=True)
class Settings:
    """How an adapter is scaled, in the words of adapter_config.json."""

    alpha: float = 1.0
    rslora: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def scale(self, target: str, rank: int) -> float:
        module = target.removesuffix(".weight")
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if re.match(rf"(.*\.)?({key})$", module)), self.alpha
        )
        from jobs.consolidation.lora import scale

        return scale(alpha, rank, self.rslora)


@dataclass
class Merge:
    """All that a plan needs: outputs, their sources, and what is added to which source."""

    outputs: list[Output]
    sources: dict[str, Stored]
    updates: "dict[str, Update]" = field(default_factory=dict)
    packed: dict[str, Dtype] = field(default_factory=dict)
    """Sources that training had in NF4, with the precision of compute, where the result is to be made of that."""
    untied: bool = False
    """A tied head was trained on its own: the result's config must say so."""

    def dtype(self) -> Dtype:
        """Of most of the numbers."""
        sizes: dict[Dtype, int] = {}
        for output in self.outputs:
            sizes[output.dtype] = sizes.get(output.dtype, 0) + output.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def as_they_are(weights: dict[str, Stored], dtype: Dtype | None) -> Merge:
    """Without a model to compare with: every weight under its own name. Raises DataError for adapters."""
    _, parts = adapters(weights)
    if parts:
        raise DataError(
            Problem("--base", None, f"{len(parts)} weights have adapters: name the model they were trained on")
        )
    return Merge([Output(key, stored.shape, _cast(stored, dtype), key) for key, stored in weights.items()], weights)


def merged(
    blue: Blueprint,
    weights: dict[str, Stored],
    base: dict[str, Stored],
    dtype: Dtype | None,
    settings: Settings | None,
) -> Merge:
    """Every tensor of the model folder; `dtype` None keeps the base's.

    Raises DataError when a weight has no place or is missing.
    """
    keys, parts = adapters(weights)
    keys, untied = _untied(blue, keys, weights)
    sources = {**weights, **{BASE + name: stored for name, stored in base.items()}}
    made = Merge([], sources, untied=bool(untied))
    wrong, missing = _unknown(blue, keys, parts), []
    for saved in [*blue.saved, *untied]:
        found = _source(saved, blue, keys, weights, base)
        if isinstance(found, str):
            (missing if found == "missing" else wrong).append(saved.name if found == "missing" else found)
            continue
        key, start = found
        kept = base.get(blue.base_name(saved, base) or "")
        made.outputs.append(Output(saved.name, saved.shape, _cast(kept or sources[key], dtype), key, start))
    if missing or wrong:
        said = f"does not fit the model: missing {missing[:3]}, unknown or misshapen {wrong[:3]}"
        raise DataError(Problem("checkpoint", None, f"{said}; name the model that was trained (model.source, --base)"))
    if parts:
        _add(made, blue, weights, keys, parts, settings or Settings())
    return made


def dequantised(made: Merge, blue: Blueprint, layers: Iterable[str], dtype: Dtype) -> None:
    """Let the base weights that are `layers` (live names) be taken as training had them, in NF4."""
    base = {key.removeprefix(BASE) for key in made.sources if key.startswith(BASE)}
    for saved in blue.saved:
        if saved.live in layers:
            made.packed[BASE + str(blue.base_name(saved, base))] = dtype


def adapter_alone(weights: dict[str, Stored], dtype: Dtype | None) -> Merge:
    """The adapters under PEFT's names in a file, and what PEFT trained whole. Raises DataError when there are none."""
    keys, parts = adapters(weights)
    if not parts:
        raise DataError(Problem("consolidate.adapter_only", True, "this checkpoint has no adapters"))
    names = {key: f"base_model.model.{PEFT_NAME.sub('', key.removeprefix('base_model.model.'))}" for key in weights}
    wanted = [key for kinds in parts.values() for key in kinds.values()]
    wanted += [key for key in keys.values() if ".modules_to_save." in key]
    return Merge([Output(names[key], weights[key].shape, _cast(weights[key], dtype), key) for key in wanted], weights)


PEFT_NAME = re.compile(
    r"(?<=lora_[AB])\.default|(?<=lora_magnitude_vector)\.default(\.weight)?|\.modules_to_save\.default"
    r"|(?<=lora_embedding_[AB])\.default"
)
"""What PEFT leaves out of the names in adapter_model.safetensors."""


def _cast(stored: Stored, dtype: Dtype | None) -> Dtype:
    """Whole numbers and truth values stay what they are."""
    return stored.dtype if dtype is None or not stored.dtype.is_floating_point else dtype


def _untied(
    blue: Blueprint, keys: dict[str, str], weights: dict[str, Stored]
) -> tuple[dict[str, str], list[SavedName]]:
    """Second names of tied weights: they stand in for a first name that is absent, or repeat it; a head that PEFT trained
    on its own (modules_to_save) is a weight of its own."""
    kept, untied = {}, []
    for name, key in keys.items():
        first = blue.tied.get(name)
        if first is None:
            kept[name] = key
        elif ".modules_to_save." in key:
            kept[name] = key
            untied.append(SavedName(name, weights[key].shape, name))
        else:
            kept.setdefault(first, key) if first not in keys else None
    return kept, untied


def _unknown(blue: Blueprint, keys: dict[str, str], parts: dict[str, Any]) -> list[str]:
    known = blue.live.keys() | blue.tied.keys()
    return sorted(name for name in [*keys, *parts] if name not in known)


def _source(
    saved: SavedName, blue: Blueprint, keys: dict[str, str], weights: dict[str, Stored], base: dict[str, Stored]
) -> tuple[str, int] | str:
    """(source, first element), or what is wrong."""
    if saved.live in keys:
        key = keys[saved.live]
        expected = blue.live.get(saved.live, saved.shape)
        if weights[key].shape != expected:
            return f"{saved.live} {list(weights[key].shape)} instead of {list(expected)}"
        return key, saved.start
    if name := blue.base_name(saved, base):
        if base[name].shape != saved.shape:
            return f"{name} {list(base[name].shape)} instead of {list(saved.shape)}"
        return BASE + name, 0
    return "missing"


def _add(
    made: Merge,
    blue: Blueprint,
    weights: dict[str, Stored],
    keys: dict[str, str],
    parts: dict[str, Any],
    settings: Settings,
) -> None:
    """Read the adapters, which are small, and give every source its own rows of them."""
    from jobs.consolidation.lora import Update

    files = Files()
    reader = Reader(files)
    try:
        whole = {
            name: {kind: tensor(reader, weights[key]) for kind, key in kinds.items()} for name, kinds in parts.items()
        }
    finally:
        files.close()
    base = {key.removeprefix(BASE) for key in made.sources if key.startswith(BASE)}
    for name, kinds in whole.items():
        update = _update(name, kinds, name in blue.transposed, settings)
        rows, columns = blue.live[name]
        if (update.b.shape[0], update.a.shape[1]) != (rows, columns):
            said = f"{name} is {rows} x {columns}, its adapter {update.b.shape[0]} x {update.a.shape[1]}: another base?"
            raise DataError(Problem("model.source", None, said))
        if name in keys:
            made.updates[keys[name]] = update
            continue
        for saved in blue.saved:
            if saved.live == name:
                key = BASE + str(blue.base_name(saved, base))
                first, count = saved.start // columns, saved.shape[0]
                magnitude = None if update.magnitude is None else update.magnitude[first : first + count]
                made.updates[key] = Update(update.a, update.b[first : first + count], update.scale, magnitude)


def _update(name: str, kinds: "dict[str, torch.Tensor]", transposed: bool, settings: Settings) -> "Update":
    from jobs.consolidation.lora import Update

    embedding = "lora_embedding_A" in kinds
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [kind for kind in (first, second) if kind not in kinds]:
        raise DataError(Problem("checkpoint", None, f"the adapter of {name} has no {missing[0]}"))
    a, b = kinds[first], kinds[second]
    found = Update(a, b, settings.scale(name, a.shape[0]), kinds.get("lora_magnitude_vector"))
    return found.transposed() if embedding or transposed else found


def tensor(reader: Reader, stored: Stored) -> "torch.Tensor":
    """A small stored tensor, whole, in fp32."""
    flat = np.empty(stored.nbytes, np.uint8)
    reader.fill(stored, 0, flat)
    return dtypes.as_tensor(flat, stored.dtype).view(stored.shape).float()
