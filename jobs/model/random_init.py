"""Generates weights that are in no file: the random weights of a new model, and the initial weights of adapters.

The seed of each unit (a decoder block, or a module outside the blocks) comes from `train.seed` and its name. The weights are
therefore the same for every number of ranks and every way to shard them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from conf.choices import AdapterInit
from conf.schema import Config
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers


def init_model(
    meta_model: PreTrainedModel, parts: Mapping[str, TensorPart], seed: int, device: torch.device
) -> list[str]:
    """Fill `parts` with the model's own initial weights, generated on `device`. Returns the names of the filled weights.

    `meta_model` is the whole model on the meta device, and is there again afterwards. Each unit is generated whole and freed again:
    a rank that generated only its own share would get other numbers than its neighbors.
    """
    filled: list[str] = []
    for name, module, recurse in _units(meta_model, "", set(meta_model._no_split_modules or ())):
        keys = [key for key, _ in _named_weights(name, module, recurse) if key in parts]
        filled += keys
        if not any(parts[key].destination.numel() for key in keys):
            continue
        module.to_empty(device=device, recurse=recurse)
        torch.manual_seed(_seed(seed, name))
        for child in _children_first(module) if recurse else (module,):
            meta_model._init_weights(child)  # type: ignore[no-untyped-call]
        _copy_to_parts(_named_weights(name, module, recurse), parts)
        module.to_empty(device="meta", recurse=recurse)
    return filled


def adapter_weights(meta_model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Name of each adapter weight, without wrappers' prefixes -> the name of its layer, and the layer (PEFT's BaseTunerLayer)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in meta_model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    return {key: (name, layer) for name, layer in layers for key, _ in _own_weights(name, layer)}


def _own_weights(name: str, layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter weights of one layer of PEFT, without those of the layer that it wraps."""
    for key, value in layer.named_parameters():
        if key.split(".")[0] in layer.adapter_layer_names:
            yield without_wrappers(f"{name}.{key}"), value


def init_adapters(meta_model: nn.Module, parts: Mapping[str, TensorPart], config: Config) -> list[str]:
    """Fill `parts` with PEFT's initial adapter weights, layer by layer. They are small, so they are generated on the CPU.

    Those that begin with a part of the base get it later, from `first_update`. Returns the names of the filled weights.
    """
    filled: list[str] = []
    init = "gaussian" if config.adapter.init is AdapterInit.gaussian else True
    for name, layer in {
        name: layer for key, (name, layer) in adapter_weights(meta_model).items() if key in parts
    }.items():
        groups = [getattr(layer, group_name) for group_name in layer.adapter_layer_names]
        for group in groups:
            group.to_empty(device="cpu")
        torch.manual_seed(_seed(config.train.seed, name))
        for adapter in layer.active_adapters:
            layer.reset_lora_parameters(adapter, init_lora_weights=init)
        own_weights = dict(_own_weights(name, layer))
        _copy_to_parts(own_weights.items(), parts)
        filled += own_weights.keys() & parts.keys()
        for group in groups:
            group.to_empty(device="meta")
    return filled


def dora_magnitudes(parts: Mapping[str, TensorPart]) -> list[tuple[TensorPart, TensorPart]]:
    """Each DoRA magnitude vector, with the base weight that gives its initial value."""
    suffix = ".lora_magnitude_vector.default.weight"
    return [
        (part, parts[f"{name.removesuffix(suffix)}.weight"]) for name, part in parts.items() if name.endswith(suffix)
    ]


def init_dora_magnitudes(pairs: list[tuple[TensorPart, TensorPart]]) -> None:
    """Set each DoRA magnitude to the norm of its weight row, so that the adapted model equals its base at the start.

    Call it once the base weights are filled. A rank must hold the magnitudes of exactly the rows that it holds, as under
    FSDP. ZeRO-3 cuts inside rows, so launcher/check/combinations.py refuses that combination.
    """
    for magnitude, weight in pairs:
        columns = weight.shape[1]
        assert (
            weight.begin == magnitude.begin * columns
            and weight.destination.numel() == magnitude.destination.numel() * columns
        )
        rows = weight.destination.view(-1, columns)
        magnitude.destination.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))


def _units(module: nn.Module, name: str, block_names: set[str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (name, module, recurse) of each unit: a decoder block with all below it, or another module's own weights."""
    if type(module).__name__ in block_names:
        yield name, module, True
        return
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module, False
    for key, child in module.named_children():
        yield from _units(child, f"{name}.{key}" if name else key, block_names)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Children before parents, as in transformers: a parent may initialize a child's weights again, with another scale."""
    for child in module.children():
        yield from _children_first(child)
    yield module


def _named_weights(name: str, module: nn.Module, recurse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    return ((without_wrappers(f"{name}.{key}"), value) for key, value in module.named_parameters(recurse=recurse))


def _copy_to_parts(weights: Iterable[tuple[str, torch.Tensor]], parts: Mapping[str, TensorPart]) -> None:
    """Copy this rank's range of each whole weight."""
    with torch.no_grad():
        for name, value in weights:
            if name in parts:
                parts[name].copy_from(value)


def _seed(seed: int, name: str) -> int:
    """The seed of one unit. Python's `hash` cannot be used, because it differs between processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{without_wrappers(name)}".encode()).digest()[:8], "little") >> 1
