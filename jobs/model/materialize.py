"""From a sharded model without weights to one with weights: no rank ever has the whole model in host memory.

`materialise` makes room, `parts` says what of it this rank holds, `fill` fills it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from conf.choices import AdapterKind, Init
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.model import pretrained, quantized_linear, random_init
from jobs.tensor_io.slices import Part, plain


def is_empty(model: nn.Module) -> bool:
    """Whether weights are still to come."""
    return any(parameter.is_meta for parameter in model.parameters())


def materialize(model: nn.Module, make: Callable[[nn.Parameter], torch.Tensor], device: torch.device) -> None:
    """Replace every parameter by what `make` gives for it, once each so that tied ones stay tied; buffers go to `device`.

    Not `to_empty`: it unties, and it empties buffers that no file can fill, such as rotary frequencies.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                value = make(parameter)
                made[parameter] = (
                    value
                    if isinstance(value, nn.Parameter)
                    else nn.Parameter(value, requires_grad=parameter.requires_grad)
                )
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def local_parts(
    model: nn.Module, held: Callable[[nn.Parameter], tuple[torch.Size, int, torch.Tensor]]
) -> dict[str, Part]:
    """What this rank has to fill, by plain name; `held` gives whole shape, first element and local tensor of a parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        shape, begin, local = held(parameter)
        found[plain(name)] = Part(tuple(shape), begin, local.detach().view(-1), parameter.requires_grad)
    return found


def fill(
    model: nn.Module,
    again: Callable[..., Any],
    held: dict[str, Part],
    config: Config,
    world: World | None = None,
    resumed: bool = False,
) -> int:
    """Fill the parts `held` of `model`; returns the bytes read from files. All ranks call this together.

    `again(config, adapters)` makes the model once more, unsharded and without weights: names, shapes and initial values
    come from that. Where a checkpoint follows (`resumed`), what it holds is left out, and is NaN until then.
    Raises ConfigError, on all ranks, with every tensor that is missing, has no place or another shape.
    """
    if resumed:
        for part in held.values():
            if part.trained:
                part.into.fill_(torch.nan)
        held = {name: part for name, part in held.items() if not part.trained}
    magnitudes = [] if resumed else random_init.dora_magnitudes(held)
    if config.adapter.kind is not AdapterKind.none:
        twin = again(config, adapters=True)
        added = random_init.adapter_weights(twin)
        random_init.init_adapters(twin, {name: part for name, part in held.items() if name in added}, config.train.seed)
        held = {name: part for name, part in held.items() if name not in added}
    if not held:
        return 0
    base = again(config, adapters=False)
    if config.model.init is Init.random:
        random_init.init_model(base, held, config.train.seed, _drawn_on(held, world))
        random_init.init_dora_magnitudes(magnitudes)
        return 0
    read = pretrained.load(base, held | _buffers(model), config, world, quantized_linear.quantized_layers(model))
    quantized_linear.share_scales(model, held)
    random_init.init_dora_magnitudes(magnitudes)
    return read


def _drawn_on(held: Mapping[str, Part], world: World | None) -> torch.device:
    """A GPU draws in seconds what a core draws in minutes, but other numbers. A frozen base is in no checkpoint, and
    whoever merges the adapters has to find it again, so that one is drawn on the CPU."""
    frozen = not all(part.trained for part in held.values())
    return torch.device("cpu") if frozen or world is None else world.device


def _buffers(model: nn.Module) -> dict[str, Part]:
    """The buffers that are stored with a model: small, and whole on every rank."""
    return {
        plain(f"{prefix}.{name}"): Part(tuple(buffer.shape), 0, buffer.view(-1), trained=False)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
