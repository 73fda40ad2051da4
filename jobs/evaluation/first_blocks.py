"""Hidden states after the first decoder blocks: of a model in training, and of a model folder of which only these are loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from jobs.model.build import blocks

COUNT = 2
"""Blocks that run: few, and yet the embedding, the positions and most kinds of weights are among what they need."""


@contextmanager
def outputs(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside this context, the output of block number COUNT is put into the list that this returns."""
    found: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if type(hidden) is torch.Tensor and hidden.ndim == 3:
            found.append(hidden)

    first = blocks(model)[:COUNT]
    hook = first[-1].register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def hidden_of(folder: Path, ids: torch.Tensor, dtype: torch.dtype, trust_remote_code: bool) -> torch.Tensor | None:
    """The hidden states (1, tokens, width) of the model in a folder. None for a family that cannot be built with fewer blocks."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **options)
    _shorten(config.get_text_config(), COUNT)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **options
        )
        model, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        with outputs(model) as hidden:
            model.eval()(input_ids=ids[None], use_cache=False)
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError):
        return None
    return hidden[-1] if hidden else None


def _shorten(config: PreTrainedConfig, count: int) -> None:
    """Let a config describe the first blocks only, also in lists that have an entry for each block."""
    layers = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:count])
    config.num_hidden_layers = min(layers, count)
