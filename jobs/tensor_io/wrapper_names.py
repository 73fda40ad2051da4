"""Removes the names of wrapper modules (torch.compile, FSDP1, recomputation, PEFT) that weight names have only in training."""

import re

_TORCH = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT = re.compile(r"^base_model\.model\.|\bbase_layer\.(?!lora_)")
"""PEFT wraps a module with two adapted parameters twice: `experts` and `experts.base_layer`. The adapter of the inner wrapper keeps
`base_layer.`, or both adapters would have the same name."""


def without_torch_wrappers(name: str) -> str:
    """`model._orig_mod.norm.weight` -> `model.norm.weight`."""
    return _TORCH.sub("", name)


def without_wrappers(name: str) -> str:
    """The name that a weight has in the model's files, without the names of torch's and PEFT's wrappers.

    `base_model.model.model.q_proj.base_layer.weight` -> `model.q_proj.weight`. Different weights keep different names.
    """
    return _PEFT.sub("", _TORCH.sub("", name))
