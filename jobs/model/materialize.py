"""Gives memory and weights to a sharded model on the meta device. No rank ever holds the whole model in host memory.

Three steps: `materialize` allocates this rank's tensors, `local_parts` lists them, `fill` writes the weights into them.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from conf.choices import AdapterKind, Init
from conf.errors import ConfigError, Problem, RunError
from conf.schema import Config
from jobs.distributed.collectives import gather, raise_on_all_ranks
from jobs.distributed.process_group import World
from jobs.model import (
    first_update,
    pretrained,
    quantized_linear,
    random_init,
    saved_modules,
    stored_adapter,
    stored_tensors,
)
from jobs.tensor_io.slices import TensorPart
from jobs.tensor_io.wrapper_names import without_wrappers

MAX_LISTED = 10
"""Weights that an error lists one by one; the others are counted."""


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
    parts: dict[str, TensorPart] = {}
    for name, parameter in model.named_parameters():
        shape, begin, tensor = local(parameter)
        plain = without_wrappers(name)
        if plain in parts:
            raise RunError(Problem("model", name, f"another weight is also called {plain}, so one of them stays empty"))
        parts[plain] = TensorPart(tuple(shape), begin, tensor.detach().view(-1), parameter.requires_grad)
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
    initial values. `resumed`: a checkpoint will be loaded next, and its weights are skipped here.
    All weights are NaN before they are filled, so that `require_filled` finds one that nothing has filled.
    Raises ConfigError on all ranks, with every tensor that is missing, unexpected or of another shape, and RunError for a
    weight that was not filled exactly once.
    """
    for part in parts.values():
        if part.destination.is_floating_point():
            part.destination.fill_(torch.nan)
    if resumed:
        parts = {name: part for name, part in parts.items() if not part.trained}
    filled: Counter[str] = Counter()
    all_parts = parts
    magnitudes = random_init.dora_magnitudes(parts)
    if config.adapter.source is not None and not resumed:
        trained = {name: part for name, part in parts.items() if part.trained}
        raise_on_all_ranks(lambda: stored_adapter.fill(trained, config))
        parts, magnitudes = {name: part for name, part in parts.items() if not part.trained}, []
    elif config.adapter.kind is not AdapterKind.none:
        meta_model = build_on_meta(config, adapters=True)
        adapter_weights = random_init.adapter_weights(meta_model)
        adapter_parts = {name: part for name, part in parts.items() if name in adapter_weights}
        filled.update(random_init.init_adapters(meta_model, adapter_parts, config))
        _check_count(adapter_parts, filled)
        parts = {name: part for name, part in parts.items() if name not in adapter_weights}
    if not parts:
        return 0
    base = build_on_meta(config, adapters=False)
    originals, *copies = saved_modules.by_stored_name(parts, base)
    if config.model.init is Init.random:
        for each in (originals, *copies):
            device = _random_device(parts, world)
            _check_count(each, Counter(random_init.init_model(base, each, config.train.seed, device)))
        random_init.init_dora_magnitudes(magnitudes)
        return 0
    read_bytes = _load(model, base, [originals, *copies], config, world)
    if first_update.changes_base(config):
        first_update.apply(build_on_meta(config), base, all_parts, config, world, resumed)
    quantized_linear.share_scales(model, originals)
    random_init.init_dora_magnitudes(magnitudes)
    return read_bytes


def _load(model: nn.Module, base: Any, parts: list[dict[str, TensorPart]], config: Config, world: World | None) -> int:
    """Fill the base weights from files, and after them the copies of some that are trained whole. Returns the bytes read."""
    originals, *copies = parts
    quantized = quantized_linear.quantized_layers(model)
    read_bytes = pretrained.load(base, originals | _stored_buffers(model), config, world, quantized)
    return read_bytes + sum(pretrained.load(base, each, config, world, {}, again=True) for each in copies)


def _check_count(parts: Mapping[str, TensorPart], filled: Counter[str]) -> None:
    """Raise RunError for each part that was not filled exactly once."""
    wrong = [
        Problem("model", name, f"was filled {filled[name]} times, not once") for name in parts if filled[name] != 1
    ]
    if wrong:
        raise RunError(*wrong[:10])


def require_filled(model: nn.Module, config: Config, resumed: bool) -> None:
    """Raise an error on all ranks that names each weight with a NaN: one that nothing has filled, or a NaN in the files.

    Call it when the sharded model has all its weights, before the first step.
    """
    found = sorted({name for names in gather(lambda: _weights_with_nan(model)) for name in names})
    if not found:
        return
    trained = {without_wrappers(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    problems = [_nan_problem(name, config, resumed and name in trained) for name in found[:MAX_LISTED]]
    if len(found) > MAX_LISTED:
        problems.append(Problem("model", len(found) - MAX_LISTED, "more weights are NaN"))
    is_ours = any("lora_" in name for name in found) or config.model.init is Init.random
    raise (RunError if resumed or is_ours else ConfigError)(*problems)


def _weights_with_nan(model: nn.Module) -> list[str]:
    """Names of the weights of which this rank's part has a NaN. Quantized weights are packed bits, and are left out."""
    packed = {id(module.weight) for module in model.modules() if isinstance(module, quantized_linear.QuantizedLinear)}
    names, flags = [], []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
        if id(parameter) not in packed and local.is_floating_point() and local.dtype.itemsize > 1:
            names.append(without_wrappers(name))
            flags.append(local.detach().isnan().any().cpu() if local.numel() else torch.tensor(False))
    return [name for name, flag in zip(names, flags, strict=True) if flag]


def _nan_problem(name: str, config: Config, from_checkpoint: bool) -> Problem:
    if from_checkpoint:
        return Problem("checkpoint", name, "is not in the checkpoint, or NaN in it: resume from an earlier checkpoint")
    if "lora_" in name or config.model.init is Init.random:
        return Problem("model", name, "was never filled: set adapter.targets to other layers, or adapter=none")
    file = stored_tensors.file_of(name, config)
    where = f" in {file}" if file else ""
    message = f"{name} has values that are not numbers (NaN){where}: download the model again, or use another model"
    return Problem("model.source", config.model.source, message)


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
