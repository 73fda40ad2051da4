"""Reads the adapters of a checkpoint, which are small, and turns them into what is added to each source."""

from dataclasses import replace
from math import prod

import numpy as np
import torch

from conf.errors import DataError, Problem
from jobs.consolidation.adapter_layers import AdapterLayer, AdapterPlan
from jobs.consolidation.lora import LoraUpdate, expert_update
from jobs.consolidation.weight_names import Blueprint, CheckpointNames, is_from_base
from jobs.model import first_update
from jobs.model.saved_names import SavedName
from jobs.tensor_io.dtypes import as_tensor
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.reader import OpenFiles, Reader

Chosen = list[tuple[SavedName, str, int]]
"""A tensor of the result, its source, and the element at which it begins in that source."""


Sources = dict[str, StoredTensor]


def add_adapters(
    sources: Sources, blueprint: Blueprint, names: CheckpointNames, adapter: AdapterPlan, chosen: Chosen
) -> dict[str, LoraUpdate]:
    """Source -> its own rows of the adapters. Raises DataError if one does not fit."""
    files, updates = OpenFiles(), dict[str, LoraUpdate]()
    reader = Reader(files)
    try:
        for module, kinds in names.adapters.items():
            layer = adapter.layers[module]
            parts = {kind: read_tensor(reader, sources[key]) for kind, key in kinds.items()}
            of_layer = _by_source(sources, blueprint, layer.weight, _make_update(layer, parts), chosen)
            if layer.init is not None:
                of_layer = {
                    source: _without_first_update(layer, read_tensor(reader, sources[source]), update)
                    if is_from_base(source)
                    else update
                    for source, update in of_layer.items()
                }
            if "lora_B.bias" in parts:
                of_bias = LoraUpdate(torch.ones(1, 1), parts["lora_B.bias"].unsqueeze(1), layer.scale)
                of_layer |= _by_source(
                    sources, blueprint, layer.weight.removesuffix("weight") + "bias", of_bias, chosen
                )
            updates |= of_layer
    finally:
        files.close()
    return updates


def _by_source(
    sources: Sources, blueprint: Blueprint, name: str, update: LoraUpdate, chosen: Chosen
) -> dict[str, LoraUpdate]:
    """The rows of the update of one live weight for each source that holds rows of it."""
    first = blueprint.tied.get(name, name)
    shape = blueprint.live[first]
    rows, columns = (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)
    if update.shape != (rows, columns):
        size = f"{update.shape[0]} x {update.shape[1]}"
        message = f"{name} is {rows} x {columns}, but its adapter {size}: was it trained on another base?"
        raise DataError(Problem("model.source", None, message))
    # a tied weight that the adapter keeps tied is written under its first name
    wanted = name if any(saved.live == name for saved, _, _ in chosen) else first
    found = {}
    for saved, source, start in chosen:
        if saved.live != wanted:
            continue
        if sources[source].numel == rows * columns and start == saved.start:
            found[source] = update  # the source is the whole live weight
            continue
        first_row, rest = divmod(saved.start, columns)
        if rest or update.of_columns or sources[source].numel % columns:
            message = f"{name} is stored in several tensors, to which its adapter cannot be added: merge it with PEFT"
            raise DataError(Problem("model.source", None, message))
        found[source] = update.rows(first_row, prod(saved.shape) // columns)
    if not found:
        raise DataError(Problem("checkpoint", None, f"has an adapter on {name}, which is not a weight of the model"))
    return found


def _make_update(layer: AdapterLayer, parts: dict[str, torch.Tensor]) -> LoraUpdate:
    kind_a, kind_b = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else ("lora_A", "lora_B")
    a, b = parts[kind_a], parts[kind_b]
    if a.shape[0] != layer.rank * layer.experts or b.shape[1] != layer.rank * layer.experts:
        message = (
            f"the adapter of {layer.weight} has rank {a.shape[0] // layer.experts}, but its settings say {layer.rank}: "
            "copy the adapter_config.json that was saved with it"
        )
        raise DataError(Problem("checkpoint", None, message))
    if layer.experts > 1:
        return expert_update(a, b, layer.scale, layer.experts, transposed=layer.experts_transposed)
    update = LoraUpdate(a, b, layer.scale, parts.get("lora_magnitude_vector"))
    return update.transposed() if layer.transposed else update


def _without_first_update(layer: AdapterLayer, weight: torch.Tensor, update: LoraUpdate) -> LoraUpdate:
    """PiSSA and OLoRA begin with an update that PEFT takes off the base, as it does again when it loads the adapter.

    A checkpoint that also has the base weights of training has them without that update.
    """
    if weight.ndim != 2 or weight.numel() != update.shape[0] * update.shape[1]:
        message = f"{layer.weight} is stored in parts, of which {layer.init} cannot be repeated: merge it with PEFT"
        raise DataError(Problem("adapter_config.json: init_lora_weights", layer.init, message))
    a, b = layer.first or first_update.of_weight(
        weight, str(layer.init), layer.rank, layer.scale, transposed=layer.transposed
    )
    if layer.transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    return replace(update, a=torch.cat([update.a, a]), b=torch.cat([update.b, -b], dim=1))


def read_tensor(reader: Reader, stored: StoredTensor) -> torch.Tensor:
    """A whole stored tensor in fp32, for small ones."""
    flat = np.empty(stored.nbytes, np.uint8)
    reader.fill(stored, 0, flat)
    return as_tensor(flat, stored.dtype).view(stored.shape).float()
