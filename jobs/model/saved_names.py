"""Which elements of a weight in memory each stored tensor is, where transformers renames, fuses or splits weights."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from jobs.tensor_io.layout import Extent, StoredTensor


class CannotStream(Exception):
    """Raised for a model of which a saved weight is not a run of elements of a live one, so that it cannot be streamed."""


@dataclass(frozen=True)
class SavedName:
    """A tensor that `save_pretrained` would write: the elements of a live weight from `start` on."""

    name: str
    shape: tuple[int, ...]
    live: str
    start: int = 0


def live_state(model: Any, only: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a model by name (those in `only`), tied weights once, and second name -> first name of the tied ones."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if only is not None:
        tied = {second: first for second, first in tied.items() if first in only}
    state = model.state_dict()
    return {name: state[name] for name in state if name not in tied and (only is None or name in only)}, tied


def saved_names(model: Any, only: Collection[str] | None = None) -> Iterable[SavedName]:
    """Which elements of which live weight each saved tensor is, in the order of the model. Raises CannotStream.

    transformers renames, fuses and splits weights on loading, and can revert that. It is reverted here with weights that are
    views of one large empty tensor (the arena). The offset of a result in the arena then says which elements it is made of.

    Example: Mixtral fuses the matrices w1 and w3 of its 4 experts into `gate_up_proj` of shape (4, 2 x 96, 64), which has
    49,152 elements. Say that this weight begins at element 8,192 of the arena. The reverted `experts.1.w3.weight`, of shape
    (96, 64), then lies at 8,192 + 12,288 (expert 0) + 6,144 (w1 of expert 1) = 26,624. So it is
    SavedName("...experts.1.w3.weight", (96, 64), "...gate_up_proj", start=18,432).
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    class ArenaView(torch.Tensor):
        """A view of the arena that stays a view where transformers would copy it."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.contiguous, torch.Tensor.clone):
                return args[0]
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    state, _ = live_state(model, only)
    arena = torch.empty(sum(value.numel() for value in state.values()), device="meta").as_subclass(ArenaView)
    ranges, views, end = [], {}, 0
    for name, value in state.items():
        begin, end = end, end + value.numel()
        views[name] = arena[begin:end].view(value.shape)
        ranges.append((begin, end, name))
    try:
        reverted = revert_weight_conversion(model, dict(views))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise CannotStream(str(error)) from error
    saved = []
    for name, view in reverted.items():
        # a result elsewhere was copied, and one with strides was transposed: neither is a run of a live weight
        if view.untyped_storage()._cdata != arena.untyped_storage()._cdata or not view.is_contiguous():
            raise CannotStream(name)
        saved.append((view.storage_offset(), name, tuple(view.shape)))
    number = 0
    for offset, name, shape in sorted(saved, key=lambda item: item[0]):
        while offset >= ranges[number][1] and number + 1 < len(ranges):
            number += 1
        begin, _, live = ranges[number]
        yield SavedName(name, shape, live, offset - begin)


def join_stored(
    saved: Iterable[SavedName], stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The stored tensors, with those that become one weight in memory as one tensor of many extents, under its name in memory.

    Nothing is read. A weight whose parts have another name, shape or dtype stays as it is stored. Also returns the parts that are
    missing while others of the same weight are there. `shapes` are those that the files must have, by the names in memory; files
    may lack `prefix` before their names.
    """
    joined, parts_of, missing = dict(stored), dict[str, list[SavedName]](), list[str]()
    for part in saved:
        parts_of.setdefault(part.live, []).append(part)
    for live, parts in parts_of.items():
        if live in stored or live not in shapes:
            continue
        found = [_named(part.name, stored, prefix) for part in parts]
        tensors = [stored[name] for name in found if name is not None]
        if 0 < len(tensors) < len(parts):
            missing += [part.name for part, name in zip(parts, found, strict=True) if name is None]
        expected = [part.shape for part in parts] if len(parts) > 1 else [shapes[live]]
        if [tensor.shape for tensor in tensors] != expected or len({tensor.dtype for tensor in tensors}) != 1:
            continue
        extents, end = list[Extent](), 0
        for part, tensor in zip(parts, tensors, strict=True):
            if part.start == end:
                extents += [replace(extent, row=end + extent.row) for extent in tensor.extents]
                end += tensor.numel
        if end == prod(shapes[live]):
            for name in found:
                joined.pop(str(name), None)
            joined[live] = StoredTensor(shapes[live], tensors[0].dtype, tuple(extents))
    return joined, missing


def _named(name: str, stored: Mapping[str, StoredTensor], prefix: str) -> str | None:
    return next((item for item in (name, name.removeprefix(prefix)) if item in stored), None)


_ADAPTER_NAME = re.compile(
    r"(?<=lora_[AB])\.default|(?<=lora_magnitude_vector)\.default(\.weight)?|\.modules_to_save\.default"
    r"|(?<=lora_embedding_[AB])\.default"
)
"""The name of the adapter (`default`), which PEFT leaves out of the names in adapter_model.safetensors."""


def name_in_adapter_file(name: str) -> str:
    """The name that a weight of the adapter has in adapter_model.safetensors."""
    return f"base_model.model.{_ADAPTER_NAME.sub('', name.removeprefix('base_model.model.'))}"
