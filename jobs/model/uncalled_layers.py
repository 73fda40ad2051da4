"""Finds layers whose weight a model reads without calling the layer: an adapter or a quantized weight there would not be seen."""

import inspect
import re
from functools import cache

from torch import nn

_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(dtype|device|shape)|\[)")
"""A weight that code uses. Its parts (`weight[...]`) are taken where Bloom repeats an old way to compute, which is off."""


def find(model: nn.Module) -> list[str]:
    """Names of linear and convolution layers whose owner reads their weight, such as `out_proj` and `dt_proj` of Mamba.

    Its kernels, and some of its code for CPUs, multiply with the weight itself.
    """
    return [
        f"{owner}.{name}".removeprefix(".")
        for owner, module in model.named_modules()
        for name, layer in module.named_children()
        if isinstance(layer, nn.Linear | nn.Conv1d) and name in _weights_read_by(type(module))  # type: ignore[arg-type]
    ]


@cache
def _weights_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the layers whose weights the code of a class of transformers reads; none if its code cannot be read."""
    if kind.__module__.startswith("torch."):
        return frozenset()
    try:
        return frozenset(match[1] for match in _READ.finditer(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()
