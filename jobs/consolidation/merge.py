"""Decides which tensors the result has, and what each is made of: a weight of the checkpoint or of the base, plus an adapter."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from conf.errors import DataError, Problem
from jobs.consolidation.plan import Output
from jobs.consolidation.quantized import check_base, check_no_cast
from jobs.consolidation.tied_weights import separate_tied
from jobs.consolidation.weight_names import (
    AGAIN,
    BASE,
    Blueprint,
    CheckpointNames,
    split_names,
)
from jobs.model.saved_names import SavedName, name_in_adapter_file
from jobs.tensor_io.dtypes import BF16, Dtype
from jobs.tensor_io.layout import StoredTensor

if TYPE_CHECKING:  # both import torch, which a merge without an adapter does not need
    from jobs.consolidation.adapter_layers import AdapterPlan
    from jobs.consolidation.lora import LoraUpdate

MAX_LISTED = 3


@dataclass
class Merge:
    """Everything that a plan needs: the outputs, their sources, and what is added to which source."""

    outputs: list[Output]
    sources: dict[str, StoredTensor]
    updates: "dict[str, LoraUpdate]" = field(default_factory=dict)
    nf4_sources: dict[str, Dtype] = field(default_factory=dict)
    """Source -> compute dtype of training, for sources that are rounded to NF4 as training had them."""
    rounded: dict[str, Dtype] = field(default_factory=dict)
    """Source -> dtype in which training had it, for frozen weights of the base that are to be the same."""
    adapter: "AdapterPlan | None" = None
    """What the checkpoint has of adapters."""
    untied: bool = False
    """Whether a tied head was trained separately, so that the config of the result must untie it."""
    copied: set[str] = field(default_factory=set)
    """Outputs that are no weights of the trained model: the base's own tensors, as they are."""
    live_names: dict[str, str] = field(default_factory=dict)
    """Name of an output -> its live name, where the files of the base call it otherwise."""

    def main_dtype(self) -> Dtype:
        """The dtype of most bytes of the trained model."""
        sizes: dict[Dtype, int] = {}
        for output in self.outputs:
            if output.name in self.copied:
                continue
            sizes[output.dtype] = sizes.get(output.dtype, 0) + output.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def merge_without_base(weights: dict[str, StoredTensor], dtype: Dtype | None) -> Merge:
    """Every weight under its own name, if no model is given to compare with.

    Raises DataError if there are adapters, or quantized weights that would be cast without their scales.
    """
    if adapters := split_names(weights).adapters:
        message = f"{len(adapters)} weights have adapters: name the model that the adapters were trained on"
        raise DataError(Problem("--base", None, message))
    outputs = [Output(key, stored.shape, _output_dtype(stored, dtype), key) for key, stored in weights.items()]
    check_no_cast(outputs, weights)
    return Merge(outputs, weights)


def merge_model(
    blueprint: Blueprint,
    weights: dict[str, StoredTensor],
    base: dict[str, StoredTensor],
    dtype: Dtype | None,
    adapter: "AdapterPlan | None" = None,
    from_base: Collection[str] = (),
) -> Merge:
    """Every tensor of the model folder, in `dtype`; None keeps the dtype that each weight has in `base`.

    `from_base` are the live names that the base may serve: weights that were frozen. All others must be in the checkpoint.
    Raises DataError if a weight is missing, unknown to the model, of another shape or not used.
    """
    names = split_names(weights)
    sources = {**weights, **{BASE + name: stored for name, stored in base.items()}}
    if names.adapters and adapter is None:
        message = f"holds adapters on {len(names.adapters)} modules: copy adapter_config.json beside it"
        raise DataError(Problem("checkpoint", None, message))
    if adapter is not None:
        from jobs.consolidation.adapter_layers import check_complete

        check_complete(adapter, names.adapters)
    untied, spare = separate_tied(blueprint, names, weights, base, adapter)
    merge = Merge([], sources, adapter=adapter, untied=bool(untied))
    chosen: list[tuple[SavedName, _Source]] = []
    missing, wrong = [], []
    for saved in [*blueprint.saved, *untied]:
        source = _find_source(saved, blueprint, names, base, from_base)
        if source is None:
            missing.append(saved.name)
            continue
        stored = sources[source.name]
        if stored.shape != source.shape:
            label = source.name.removeprefix(BASE) if source.name.startswith(BASE) else saved.live
            wrong.append(f"{label} {list(stored.shape)} instead of {list(source.shape)}")
            continue
        if saved in untied and any(taken.name == source.name for _, taken in chosen):
            sources[AGAIN + source.name] = stored
            source = source._replace(name=AGAIN + source.name)
        chosen.append((saved, source))
        in_base = base.get(blueprint.base_name(saved, base) or "", stored)
        merge.outputs.append(Output(saved.name, saved.shape, _output_dtype(in_base, dtype), source.name, source.start))
    used = {source.name.removeprefix(AGAIN) for _, source in chosen} | spare
    if not wrong:
        wrong = sorted(name for name, key in names.whole.items() if key not in used)
    if missing or wrong:
        raise _does_not_fit(missing, wrong, bool(base), names)
    check_base(merge.outputs, base)
    check_no_cast(merge.outputs, sources)
    if adapter is not None:
        from jobs.consolidation.updates import add_adapters

        placed = [(saved, source.name, source.start) for saved, source in chosen]
        merge.updates = add_adapters(sources, blueprint, names, adapter, placed)
    return merge


def adapter_weights_from_base(
    blueprint: Blueprint, names: CheckpointNames, adapter: "AdapterPlan", excluded: Collection[str]
) -> frozenset[str]:
    """Live names of the weights that the base may serve under an adapter: all that were frozen, if the checkpoint has none of them.

    A checkpoint with some frozen weights should have them all, except those in `excluded`, which it says it was saved without.
    Embeddings may be there alone: PEFT writes those that have an adapter or new tokens into the folder of the adapter.
    """
    frozen = (blueprint.live.keys() | blueprint.tied.keys()) - adapter.trained
    whole = {name for name, key in names.whole.items() if name in frozen and ".base_layer." not in key}
    embeddings = {name for name in whole if name.rpartition(".")[0] in adapter.embeddings}
    return frozenset(excluded if whole - embeddings else frozen)


def _does_not_fit(missing: list[str], wrong: list[str], has_base: bool, names: CheckpointNames) -> DataError:
    message = (
        f"does not fit the model: {len(missing)} weights missing {missing[:MAX_LISTED]}, {len(wrong)} unknown or of another "
        f"shape {wrong[:MAX_LISTED]}"
    )
    remedy = "name the model that was trained (model.source, --base)"
    if missing and not wrong and (names.whole or names.adapters):
        served = "; the base serves only weights that were frozen in training" if has_base else ""
        remedy = f"copy or save the checkpoint with all of its weights{served}"
    return DataError(Problem("checkpoint", None, f"{message}; {remedy}"))


def use_dequantized_base(merge: Merge, blueprint: Blueprint, layers: Iterable[str], compute_dtype: Dtype) -> None:
    """Round the base weights of `layers` (live names) to NF4, as training had them."""
    base = {key.removeprefix(BASE) for key in merge.sources if key.startswith(BASE)}
    for saved in blueprint.saved:
        if saved.live in layers:
            merge.nf4_sources[BASE + str(blueprint.base_name(saved, base))] = compute_dtype


def merge_adapter_only(weights: dict[str, StoredTensor], dtype: Dtype | None) -> Merge:
    """The adapters, and the modules that PEFT trained whole, under PEFT's names in files. Raises DataError if there are none."""
    names = split_names(weights)
    if not names.adapters:
        message = "this checkpoint has no adapters: remove it, or name the checkpoint of a run with an adapter"
        raise DataError(Problem("consolidate.adapter_only", True, message))
    wanted = [key for kinds in names.adapters.values() for key in kinds.values()]
    wanted += [key for key in names.whole.values() if ".modules_to_save." in key]
    outputs = []
    for key in wanted:
        outputs.append(Output(name_in_adapter_file(key), weights[key].shape, _output_dtype(weights[key], dtype), key))
    return Merge(outputs, weights)


def _output_dtype(stored: StoredTensor, dtype: Dtype | None) -> Dtype:
    """Integers and booleans keep their dtype. Dequantized weights, which have no dtype of their own, are written in bf16."""
    if stored.is_quantized:
        return dtype or BF16
    return stored.dtype if dtype is None or not stored.dtype.is_floating_point else dtype


class _Source(NamedTuple):
    name: str
    shape: tuple[int, ...]
    """Expected by the model."""
    start: int
    """First element of the output in it."""


def _find_source(
    saved: SavedName,
    blueprint: Blueprint,
    names: CheckpointNames,
    base: dict[str, StoredTensor],
    from_base: Collection[str],
) -> _Source | None:
    """The weight of the checkpoint, under its live name or that of files, or else of the base, with the elements of a tensor."""
    if saved.live in names.whole:
        return _Source(names.whole[saved.live], blueprint.live.get(saved.live, saved.shape), saved.start)
    if saved.name in names.whole:
        return _Source(names.whole[saved.name], saved.shape, 0)
    name = blueprint.base_name(saved, base) if saved.live in from_base or saved.name in from_base else None
    return _Source(BASE + name, saved.shape, 0) if name else None
