"""Weights that are in no file: drawn from (train.seed, name) one block at a time, so that every layout starts from the same."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from jobs.tensor_io.slices import Part, plain


def init_model(twin: PreTrainedModel, parts: Mapping[str, Part], seed: int, device: torch.device) -> None:
    """Fill `parts` with the model's own initial weights. `twin` is the whole model without weights; it stays without.

    Each block is drawn whole and freed again: a rank that drew only its share would draw other numbers than its neighbours.
    """
    for name, module, recurse in _units(twin, "", set(twin._no_split_modules or ())):
        if not any(parts[key].into.numel() for key, _ in _tensors(name, module, recurse) if key in parts):
            continue
        module.to_empty(device=device, recurse=recurse)
        torch.manual_seed(_seed(seed, name))
        for child in _inside_out(module) if recurse else (module,):
            twin._init_weights(child)
        _hand_out(_tensors(name, module, recurse), parts)
        module.to_empty(device="meta", recurse=recurse)


def adapter_weights(twin: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Plain name of each adapter weight -> the name of its layer, and the layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        plain(f"{name}.{key}"): (name, module)
        for name, module in twin.named_modules()
        if isinstance(module, BaseTunerLayer)
        for key, _ in module.named_parameters()
        if key.split(".")[0] in module.adapter_layer_names
    }


def init_adapters(twin: nn.Module, parts: Mapping[str, Part], seed: int) -> None:
    """Fill `parts` as PEFT would: layer by layer, and on the CPU, since they are small."""
    for name, layer in {name: layer for key, (name, layer) in adapter_weights(twin).items() if key in parts}.items():
        held = [getattr(layer, kind) for kind in layer.adapter_layer_names]
        for group in held:
            group.to_empty(device="cpu")
        torch.manual_seed(_seed(seed, name))
        for adapter in layer.active_adapters:
            layer.reset_lora_parameters(adapter, init_lora_weights=True)
        _hand_out(((plain(f"{name}.{key}"), value) for key, value in layer.named_parameters()), parts)
        for group in held:
            group.to_empty(device="meta")


def dora_magnitudes(parts: Mapping[str, Part]) -> list[tuple[Part, Part]]:
    """Each of DoRA's magnitudes with the weight whose row norms it starts from."""
    suffix = ".lora_magnitude_vector.default.weight"
    return [
        (part, parts[f"{name.removesuffix(suffix)}.weight"]) for name, part in parts.items() if name.endswith(suffix)
    ]


def init_dora_magnitudes(pairs: list[tuple[Part, Part]]) -> None:
    """Set DoRA's magnitudes to the norms of their rows, once these are filled: the adapted model then equals its base.

    A rank that holds some rows of a weight must hold the same of its magnitudes, as under FSDP; ZeRO-3's partitions are
    refused before (launcher/check/rules.py).
    """
    for magnitude, weight in pairs:
        columns = weight.shape[1]
        assert weight.begin == magnitude.begin * columns and weight.into.numel() == magnitude.into.numel() * columns
        rows = weight.into.view(-1, columns)
        magnitude.into.copy_(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))


def _units(module: nn.Module, name: str, blocks: set[str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, with all below it) of what is drawn as one: a decoder block, or whatever else has weights of its own."""
    if type(module).__name__ in blocks:
        yield name, module, True
        return
    if any(True for _ in module.parameters(recurse=False)):
        yield name, module, False
    for key, child in module.named_children():
        yield from _units(child, f"{name}.{key}" if name else key, blocks)


def _inside_out(module: nn.Module) -> Iterator[nn.Module]:
    """Children before parents, as transformers does: a parent may draw a child's weights again, on another scale."""
    for child in module.children():
        yield from _inside_out(child)
    yield module


def _tensors(name: str, module: nn.Module, recurse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    return ((plain(f"{name}.{key}"), value) for key, value in module.named_parameters(recurse=recurse))


@torch.no_grad()
def _hand_out(tensors: Iterator[tuple[str, torch.Tensor]], parts: Mapping[str, Part]) -> None:
    for name, value in tensors:
        if name in parts:
            part = parts[name]
            part.into.copy_(value.reshape(-1)[part.begin : part.begin + part.into.numel()])


def _seed(seed: int, name: str) -> int:
    """Of one unit; not `hash`, which differs between processes."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{plain(name)}".encode()).digest()[:8], "little") >> 1
