"""Gives memory and weights to a sharded model on the meta device. No rank ever holds the whole model in host memory.

Three steps: `materialize` allocates this rank's tensors, `local_parts` lists them, `fill` writes the weights into them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from conf.choices import AdapterKind, Init
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model import pretrained, quantized_linear, random_init
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers


def is_empty(model: nn.Module) -> bool:
    """Whether the model has parameters without data (on the meta device)."""
    return any(parameter.is_meta for parameter in model.parameters())


def materialize(model: nn.Module, make: Callable[[nn.Parameter], torch.Tensor], device: torch.device) -> None:
    """Replace every parameter by what `make` returns for it, and move the buffers to `device`.

    `make` is called once per parameter, so that tied weights stay tied. `nn.Module.to_empty` would untie them, and it would
    empty buffers that no file can fill, such as rotary frequencies.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in replaced:
                value = make(parameter)
                replaced[parameter] = (
                    value
                    if isinstance(value, nn.Parameter)
                    else nn.Parameter(value, requires_grad=parameter.requires_grad)
                )
            module._parameters[name] = replaced[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def local_parts(
    model: nn.Module, local: Callable[[nn.Parameter], tuple[torch.Size, int, torch.Tensor]]
) -> dict[str, TensorPart]:
    """Return what this rank must fill, by parameter name without wrappers' prefixes.

    `local` returns for a parameter: the shape of the whole weight, the index of this rank's first element in it, and this
    rank's tensor.
    """
    parts = {}
    for name, parameter in model.named_parameters():
        shape, begin, tensor = local(parameter)
        parts[without_wrappers(name)] = TensorPart(
            tuple(shape), begin, tensor.detach().view(-1), parameter.requires_grad
        )
    return parts


def fill(
    model: nn.Module,
    build_on_meta: Callable[..., Any],
    parts: dict[str, TensorPart],
    config: Config,
    world: World | None = None,
    resumed: bool = False,
) -> int:
    """Fill `parts` of `model` with weights; returns the number of bytes read from files. All ranks must call this together.

    `build_on_meta(config, adapters)` builds the model again, unsharded and without weights, to look up names, shapes and
    initial values. `resumed`: a checkpoint will be loaded next. Its weights are then skipped here and set to NaN, so that a
    weight missing from the checkpoint shows at once.
    Raises ConfigError on all ranks, with every tensor that is missing, unexpected or of another shape.
    """
    if resumed:
        for part in parts.values():
            if part.trained:
                part.destination.fill_(torch.nan)
        parts = {name: part for name, part in parts.items() if not part.trained}
    magnitudes = [] if resumed else random_init.dora_magnitudes(parts)
    if config.adapter.kind is not AdapterKind.none:
        meta_model = build_on_meta(config, adapters=True)
        adapter_weights = random_init.adapter_weights(meta_model)
        adapter_parts = {name: part for name, part in parts.items() if name in adapter_weights}
        random_init.init_adapters(meta_model, adapter_parts, config.train.seed)
        parts = {name: part for name, part in parts.items() if name not in adapter_weights}
    if not parts:
        return 0
    base = build_on_meta(config, adapters=False)
    if config.model.init is Init.random:
        random_init.init_model(base, parts, config.train.seed, _random_device(parts, world))
        random_init.init_dora_magnitudes(magnitudes)
        return 0
    quantized = quantized_linear.quantized_layers(model)
    read_bytes = pretrained.load(base, parts | _stored_buffers(model), config, world, quantized)
    quantized_linear.share_scales(model, parts)
    random_init.init_dora_magnitudes(magnitudes)
    return read_bytes


def _random_device(parts: Mapping[str, TensorPart], world: World | None) -> torch.device:
    """Where random weights are generated. A GPU needs seconds where a CPU core needs minutes, but gives other numbers.

    A frozen base is always generated on the CPU: it is in no checkpoint, and merging the adapter generates it again,
    possibly on a node without GPUs.
    """
    frozen = not all(part.trained for part in parts.values())
    return torch.device("cpu") if frozen or world is None else world.device


def _stored_buffers(model: nn.Module) -> dict[str, TensorPart]:
    """The buffers that are stored with a model. They are small, and every rank holds all of them."""
    return {
        without_wrappers(f"{prefix}.{name}"): TensorPart(tuple(buffer.shape), 0, buffer.view(-1), trained=False)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
