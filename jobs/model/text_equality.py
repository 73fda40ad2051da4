"""Tries before training whether the model of text inside a multimodal model computes what the whole one computes on text.

Both are tiny models of the same classes with the same weights. Where the whole model does more with text than its decoder and
its head (other positions, another mask, scaled embeddings), training the model of text alone would be wrong, and is refused.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.errors import ConfigError, Problem, first_line
from jobs.model import multimodal, shrink
from jobs.model.multimodal import WholeModel

TOKENS = 13
"""More than the windows of `shrink`."""
MAX_WEIGHTS = 200_000_000
"""A tiny model with more weights is not tried."""
TOLERANCE = 1e-4
"""Largest difference of logits, as a share of their size, that another order of operations can explain."""
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments with which some models are told what is an image: 0 is text."""


def require(text_model: PreTrainedModel, whole: WholeModel, source: str) -> None:
    """Raise ConfigError unless the whole model computes the logits and gradients of the model of text.

    `text_model` may be without weights.
    """
    reason = "no tiny model of it can be built"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        for small_config in shrink.configs(text_model.config):
            try:
                reason = _difference(small_config, whole)
                break
            except Exception as error:  # any code of a model: widths of this config do not match
                reason = f"a tiny one cannot be tried ({type(error).__name__}: {first_line(error)})"
    if reason:
        message = f"the text of {type(whole.model).__name__} cannot be trained alone: {reason}. Name a model of text"
        raise ConfigError(Problem("model.source", source, message))


def _difference(small_config: Any, whole: WholeModel) -> str:
    """How the whole model differs from the model of text; empty if it does not."""
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(small_config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    if _weights(text) > MAX_WEIGHTS:
        raise ValueError(f"it has {_weights(text):,} weights")
    text = AutoModelForCausalLM.from_config(small_config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    shrink.fill(text)
    shell = _shell(small_config, text, whole)
    ids = torch.randint(3, shrink.VOCABULARY, (1, TOKENS))
    with torch.no_grad():
        if not _equal(_logits(shell.eval(), ids), _logits(text.eval(), ids)):
            return "the whole model has other logits on text"
    accepted = inspect.signature(shell.forward).parameters
    types = {name: torch.zeros_like(ids) for name in TOKEN_TYPES if name in accepted}
    trained = [weight for weight in text.parameters() if weight.requires_grad]
    logits, whole_logits = _logits(text.train(), ids), _logits(shell.train(), ids, **types)
    if not _equal(whole_logits, logits):
        return "the whole model has other logits on text while it is trained"
    gradients, whole_gradients = (
        torch.autograd.grad(item.square().sum(), trained, allow_unused=True) for item in (logits, whole_logits)
    )
    for one, other in zip(gradients, whole_gradients, strict=True):
        if (one is None) != (other is None) or (one is not None and other is not None and not _equal(other, one)):
            return "the whole model has other gradients on text"
    return ""


def _logits(model: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return logits


def _equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.shape == expected.shape and bool(
        (actual - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1e-6)
    )


def _shell(small_config: Any, text: Any, whole: WholeModel) -> Any:
    """The whole model around the decoder and the head of `text`; its towers stay without weights."""
    config = copy.deepcopy(whole.config)
    inner = config.get_text_config()
    field = next(name for name, value in vars(config).items() if value is inner)
    setattr(config, field, small_config)
    auto_class = multimodal.auto_class(config)
    with torch.device("meta"):
        shell = auto_class.from_config(config, dtype=torch.float32)
    for text_prefix, whole_prefix in whole.prefixes:
        module = text.get_submodule(text_prefix.removesuffix(".")) if text_prefix else text
        parent, _, name = whole_prefix.removesuffix(".").rpartition(".")
        setattr(shell.get_submodule(parent) if parent else shell, name, module)
    plugged = {id(module) for module in text.modules()}
    for module in _small_parts(shell, plugged):
        module.to_empty(device="cpu")
        for weight in module.parameters():
            nn.init.zeros_(weight)
    return shell


def _small_parts(module: nn.Module, plugged: set[int]) -> Iterator[nn.Module]:
    """What lies beside the decoder and is no tower: some models run it on text too."""
    for child in module.children():
        if id(child) in plugged:
            continue
        parts = list(child.modules())
        if any(id(item) in plugged for item in parts):
            yield from _small_parts(child, plugged)
        elif not any(isinstance(item, PreTrainedModel) for item in parts) and _weights(child) <= MAX_WEIGHTS:
            yield child


def _weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
