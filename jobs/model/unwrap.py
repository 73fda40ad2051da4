"""Finds the causal language model inside PEFT's and DeepSpeed's wrappers, and replaces forwards temporarily."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def causal_lm(model: Any) -> Any:
    """The transformers causal language model inside DeepSpeed's engine and PEFT's wrapper, either or both."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def stubbed_forwards(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of these modules inside this context, to run a model's own code without its weights."""
    originals = {module: module.forward for module in stubs}
    try:
        for module, stub in stubs.items():
            module.forward = stub
        yield
    finally:
        for module, forward in originals.items():
            module.forward = forward
