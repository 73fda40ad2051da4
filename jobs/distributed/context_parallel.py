"""Context parallelism: ranks that share the rows of a micro batch, each with a stretch of every row's tokens.

All but attention looks at one token at a time. For attention the ranks exchange, so that each has all tokens of some heads
(Jacobs 2023, "DeepSpeed Ulysses"): every kernel works as it is, packed rows too, and all ranks do equal work, where rings over
stretches of tokens would have to be balanced.
"""

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import PreTrainedConfig

from conf.errors import ConfigError, Problem
from jobs.distributed.process_group import World

_group: dist.ProcessGroup | None = None


def install(shape: PreTrainedConfig, world: World) -> None:
    """From now on attention is computed over the ranks that share rows. All ranks call this, before the model is used.

    Raises ConfigError where the model's heads cannot be shared out.
    """
    global _group
    _group = None
    size = world.context_ranks
    if size == 1:
        return
    text = shape.get_text_config()
    heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % size or (shared % size and size % shared):
        said = f"cannot share out the model's {heads} heads of queries and {shared} of keys: take a divisor of both"
        raise ConfigError(Problem("parallel.context_ranks", size, said))
    stride = world.tensor_ranks
    for first in range(0, world.size, size * stride):
        for beside in range(stride):
            members = list(range(first + beside, first + beside + size * stride, stride))
            made = dist.new_group(members)
            if world.rank in members:
                _group = made


def ranks() -> int:
    """How many ranks share a row."""
    return 1 if _group is None else _group.size()


def heads_of(tensor: torch.Tensor) -> torch.Tensor:
    """(rows, heads, this rank's tokens, head size) -> (rows, this rank's heads, all tokens, head size).

    Where there are fewer heads than ranks, as of grouped keys, neighbours get the same one.
    """
    size = ranks()
    if size == 1:
        return tensor
    if tensor.shape[1] < size:
        tensor = tensor.repeat_interleave(size // tensor.shape[1], dim=1)
    found = _exchanged(tensor.unflatten(1, (size, -1)).movedim(1, 0))  # (ranks, rows, heads, tokens, head size)
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)


def tokens_of(tensor: torch.Tensor) -> torch.Tensor:
    """(rows, all tokens, this rank's heads, head size) -> (rows, this rank's tokens, heads, head size)."""
    size = ranks()
    if size == 1:
        return tensor
    found = _exchanged(tensor.unflatten(1, (size, -1)).movedim(1, 0))  # (ranks, rows, tokens, heads, head size)
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Part i of the first dimension goes to rank i; what came from rank i is part i."""
    assert _group is not None
    flat = tensor.contiguous()
    return all_to_all_single_autograd(flat.flatten(0, 1), None, None, _group).unflatten(0, flat.shape[:2])
