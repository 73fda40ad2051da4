"""Adapters that begin with a part of the base, which is taken off it: PiSSA and OLoRA (`adapter.init`), as PEFT makes them.

Ranks share the work: each decomposes whole weights, one at a time, on its device. RUN/adapter_init.safetensors keeps the first
matrices, so that a resume and the merge take exactly the same part off the base.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from conf import files
from conf.choices import AdapterInit
from conf.errors import ConfigError, Problem, RunError
from conf.schema import Config
from jobs.distributed import heartbeat
from jobs.distributed.collectives import gather, raise_on_all_ranks
from jobs.distributed.process_group import World
from jobs.model import pretrained
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers

FILE = "adapter_init.safetensors"
NAME = "default"
"""PEFT's name of the adapter."""


class Pair(NamedTuple):
    """The matrices A (rank, in) and B (out, rank) with which an adapter begins, fp32."""

    a: torch.Tensor
    b: torch.Tensor


def changes_base(config: Config) -> bool:
    """Whether adapters begin with a part of the base."""
    return config.adapter.init in (AdapterInit.pissa, AdapterInit.olora)


def of_weight(weight: torch.Tensor, init: str, rank: int, scale: float, *, transposed: bool = False) -> Pair:
    """The first matrices of PEFT's own layer for a weight (out, in), or (in, out) if it is stored transposed."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    rows, columns = weight.shape
    with torch.device("meta"):
        linear: Any = nn.Linear(columns, rows, bias=False)
        if transposed:
            linear = Conv1D(columns, rows)  # type: ignore[no-untyped-call] # transformers'
    linear.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(init_lora_weights=init, fan_in_fan_out=transposed)  # type: ignore[arg-type]
    with torch.no_grad():
        made = Linear(linear, NAME, config, r=rank, lora_alpha=scale * rank)  # type: ignore[arg-type]
    return Pair(*(getattr(made, kind)[NAME].weight.detach().float() for kind in ("lora_A", "lora_B")))


def apply(
    meta_model: nn.Module,
    base: PreTrainedModel,
    parts: Mapping[str, TensorPart],
    config: Config,
    world: World | None,
    resumed: bool,
) -> None:
    """Take the first update off the base weights in `parts`, and fill the adapters with it, unless the run is `resumed`.

    `meta_model` is the model with adapters, and `base` the one without, both on the meta device. The base weights are filled.
    All ranks call this together. Raises ConfigError for a layer that cannot begin like this.
    """
    layers = _layers(meta_model, config)
    path = Path(config.run_dir) / FILE
    if resumed or (world is None and path.exists()):
        pairs = raise_on_all_ranks(lambda: read(path, list(layers)))
    else:
        pairs = _compute(layers, base, config, world)
        if world is not None:
            gather(lambda: _write(path, pairs) if world.is_main else None)
    for name, layer in layers.items():
        pair = pairs[name]
        _take_off(parts[f"{name}.weight"], pair, layer.scaling[NAME])
        for kind, value in (("lora_A", pair.a), ("lora_B", pair.b)):
            part = parts.get(f"{name}.{kind}.{NAME}.weight")
            if part is not None and not resumed:
                part.copy_from(value)


def read(path: Path, names: Sequence[str]) -> dict[str, Pair]:
    """The first matrices of these layers. Raises RunError if the file lacks one."""
    try:
        stored = load_file(path)
        return {name: Pair(stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]) for name in names}
    except (OSError, KeyError, SafetensorError) as error:
        message = f"cannot be read ({error}): it has what was taken off the base. Restore it, or start a new run"
        raise RunError(Problem(FILE, path, message)) from error


def _write(path: Path, pairs: Mapping[str, Pair]) -> None:
    tensors = {
        f"{name}.lora_{kind}": value for name, pair in pairs.items() for kind, value in zip("AB", pair, strict=True)
    }
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, files.partial(path))
    files.sync(files.partial(path))
    os.replace(files.partial(path), path)


def _layers(meta_model: nn.Module, config: Config) -> dict[str, Any]:
    """PEFT's layers by the name of the layer that each wraps."""
    from peft.tuners.lora import Linear, LoraLayer

    found: dict[str, Any] = {
        without_wrappers(name): layer for name, layer in meta_model.named_modules() if isinstance(layer, LoraLayer)
    }
    model: Any = meta_model
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, layer in found.items():
        is_end = id(layer) in ends or id(layer.get_base_layer()) in ends
        if not isinstance(layer, Linear) or layer.fan_in_fan_out or is_end:
            message = f"can begin only in linear layers of blocks, and {name} is none: remove it from adapter.targets"
            raise ConfigError(
                Problem("adapter.init", config.adapter.init.name, f"{message}, or use adapter.init=default")
            )
    return found


def _compute(layers: Mapping[str, Any], base: PreTrainedModel, config: Config, world: World | None) -> dict[str, Pair]:
    """Decompose every weight: the layers take turns over the ranks. The result is on all ranks."""
    if reason := pretrained.why_whole(base, config, world):
        message = (
            f"needs one weight after another, but {reason}: save the model as safetensors, or use adapter.init=default"
        )
        raise ConfigError(Problem("adapter.init", config.adapter.init.name, message))
    rank, size = (world.rank, world.size) if world else (0, 1)
    device = world.device if world else torch.device("cpu")
    names, pairs = list(layers), dict[str, Pair]()
    for turn in range(ceil(len(names) / size)):
        group = names[turn * size : (turn + 1) * size]
        name = group[rank] if rank < len(group) else None
        own: Pair | None = None
        wanted = {}
        if name is not None:
            shape = layers[name].get_base_layer().weight.shape
            whole = torch.empty(shape, dtype=base.dtype, device=device)
            wanted = {f"{name}.weight": TensorPart(tuple(shape), 0, whole.view(-1), trained=False)}
        pretrained.load(base, wanted, config, world, {}, again=True)
        if name is not None:
            layer = layers[name]
            heartbeat.beat("load")
            # in fp32: PEFT rounds the matrices to the dtype of the weight, after it took the unrounded ones off
            pair = of_weight(whole.float(), config.adapter.init.name, layer.r[NAME], layer.scaling[NAME])
            own = Pair(*(value.cpu() for value in pair))
        for other, found in zip(group, gather(partial(_itself, own)), strict=False):
            assert found is not None
            pairs[other] = found
    return pairs


def _itself(pair: Pair | None) -> Pair | None:
    return pair


def _take_off(part: TensorPart, pair: Pair, scale: float) -> None:
    """Subtract this rank's part of scale * B @ A, computed in fp32."""
    count, columns = part.destination.numel(), part.shape[1]
    if not count:
        return
    first, last = part.begin // columns, (part.begin + count - 1) // columns + 1
    device = part.destination.device
    update = scale * pair.b[first:last].to(device) @ pair.a.to(device)
    start = part.begin - first * columns
    part.destination.copy_(part.destination.float() - update.view(-1)[start : start + count])
