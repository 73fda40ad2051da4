"""Modules that PEFT trains whole beside the adapters (`adapter.modules_to_save`): each is a copy, and the original stays frozen."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.model.quantized_linear import QuantizedLinear
from jobs.tensor_io.slices import TensorPart

KEY = "adapter.modules_to_save"
COPY, ORIGINAL = ".modules_to_save.default.", ".original_module."
"""In the names of weights: of the trained copy, and of the frozen original."""


def check(config: Config, model: PreTrainedModel) -> None:
    """Raise ConfigError for a name in `adapter.modules_to_save` that no layer has, or whose layer cannot be trained whole.

    Also if tokens were added to the tokenizer, and not both the embedding and the output head are trained.
    """
    chosen = config.adapter.modules_to_save
    ends = {name: module for name, module in model.named_modules() if name}
    for end in chosen:
        found = {name: module for name, module in ends.items() if name.endswith(end)}
        if not found:
            message = f"no layer of the model has this name; some are {', '.join(_examples(model))}. Correct it"
            raise ConfigError(Problem(KEY, end, message))
        for name, module in found.items():
            if reason := _why_not(module):
                raise ConfigError(Problem(KEY, end, f"{name} {reason}"))
    if getattr(model, "rows_before", None) is not None:
        _require_both_ends(config, model, ends)


def _why_not(module: nn.Module) -> str:
    if any(True for _ in module.children()):
        return "has layers inside. Name these layers"
    if isinstance(module, QuantizedLinear):
        return "is stored quantized, and cannot be trained. Use adapter=lora, or name layers outside of the blocks"
    return "" if any(True for _ in module.parameters()) else "has no weights. Remove it"


def _require_both_ends(config: Config, model: PreTrainedModel, named: Mapping[str, nn.Module]) -> None:
    """New tokens need a trained row in the embedding and in the output head, also where the two are tied: PEFT unties them."""
    both = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    names = [name for name, module in named.items() if any(module is end for end in both)]
    missing = [name for name in names if not any(name.endswith(end) for end in config.adapter.modules_to_save)]
    if missing:
        wanted = ",".join(name.rpartition(".")[2] for name in names)
        message = f"the tokenizer has new tokens, and {missing[0]} would not learn them. Set {KEY}=[{wanted}]"
        raise ConfigError(Problem(KEY, f"[{','.join(config.adapter.modules_to_save)}]", message))


def _examples(model: nn.Module) -> list[str]:
    leaves = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return [leaves[0], leaves[-2], leaves[-1]] if len(leaves) > 2 else leaves


def is_inside_wrapper(name: str) -> bool:
    """Whether a module is a copy or its original, which PEFT's wrapper holds."""
    return any(part in f"{name}." for part in (COPY, ORIGINAL))


def copies(model: nn.Module) -> Iterator[nn.Module]:
    """The trained copies."""
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield module.modules_to_save["default"]


def to_fp32(model: nn.Module) -> None:
    """Give the copies fp32 weights, like the adapters have. The base is in the dtype of compute."""
    for copy in copies(model):
        copy.float()


def trained_copy(module: Any) -> Any:
    """The copy inside PEFT's wrapper; any other module as it is."""
    from peft.utils.other import ModulesToSaveWrapper

    return module.modules_to_save["default"] if isinstance(module, ModulesToSaveWrapper) else module


def by_stored_name(parts: Mapping[str, TensorPart], base: PreTrainedModel) -> list[dict[str, TensorPart]]:
    """The parts under their names in `base`: the originals with all others, then the copies.

    Copies of tied weights have one name in `base`. Each then comes in a dictionary of its own.
    """
    tied = dict(getattr(base, "all_tied_weights_keys", None) or {})
    result = [{name.replace(ORIGINAL, "."): part for name, part in parts.items() if COPY not in name}]
    for name, part in parts.items():
        if COPY in name:
            stored = name.replace(COPY, ".")
            stored = tied.get(stored, stored)
            free = next((names for names in result[1:] if stored not in names), None)
            if free is None:
                result.append(free := {})
            free[stored] = part
    return result
