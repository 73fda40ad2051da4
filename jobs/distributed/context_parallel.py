"""Context parallelism: several ranks share the rows of a micro batch, and each rank has one part of every row's tokens.

Only attention mixes tokens, so only attention communicates. Before it, an all-to-all gives each rank all tokens of some heads;
after it, another one gives each rank all heads of its tokens again (Jacobs 2023, "DeepSpeed Ulysses"). So every attention kernel
works unchanged, packed rows too, and all ranks do equal work. Ring attention would need load balancing between the parts of a row.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import PreTrainedConfig

from conf.errors import ConfigError, Problem
from jobs.distributed.process_group import World

_group: dist.ProcessGroup | None = None


def create_groups(model_config: PreTrainedConfig, world: World) -> None:
    """Create the process group of the ranks that share rows; attention uses it from now on.

    All ranks call this before the model is used, because creating a group is collective. Raises ConfigError if the model's heads
    cannot be divided over these ranks.
    """
    global _group
    _group = None
    size = world.context_ranks
    if size == 1:
        return
    text_config = model_config.get_text_config()
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    if heads % size or (kv_heads % size and size % kv_heads):
        message = (
            f"cannot divide the model's {heads} query heads and {kv_heads} key heads: take a divisor of both numbers"
        )
        raise ConfigError(Problem("parallel.context_ranks", size, message))
    # Tensor ranks are neighbors, so the ranks of one context group are `tensor_ranks` apart. Every rank has to create every group.
    stride = world.tensor_ranks
    for first in range(0, world.size, size * stride):
        for offset in range(stride):
            members = list(range(first + offset, first + offset + size * stride, stride))
            group = dist.new_group(members)
            if world.rank in members:
                _group = group


def group_size() -> int:
    """Number of ranks that share a row."""
    return 1 if _group is None else _group.size()


@contextmanager
def switched_off() -> Iterator[None]:
    """Attention does not communicate inside this context, so that one rank alone can run a model."""
    global _group
    group, _group = _group, None
    try:
        yield
    finally:
        _group = group


def shard_heads(tensor: torch.Tensor) -> torch.Tensor:
    """All-to-all before attention: exchange sharded tokens for sharded heads.

    (rows, heads, this rank's tokens, head size) -> (rows, this rank's heads, all tokens, head size). Differentiable.
    If there are fewer heads than ranks (grouped keys), neighboring ranks get the same head.
    """
    size = group_size()
    if size == 1:
        return tensor
    if tensor.shape[1] < size:
        tensor = tensor.repeat_interleave(size // tensor.shape[1], dim=1)
    parts = _all_to_all(tensor.unflatten(1, (size, -1)).movedim(1, 0))  # (ranks, rows, heads, tokens, head size)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def shard_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """All-to-all after attention: exchange sharded heads for sharded tokens.

    (rows, all tokens, this rank's heads, head size) -> (rows, this rank's tokens, heads, head size). Differentiable.
    """
    size = group_size()
    if size == 1:
        return tensor
    parts = _all_to_all(tensor.unflatten(1, (size, -1)).movedim(1, 0))  # (ranks, rows, tokens, heads, head size)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _all_to_all(tensor: torch.Tensor) -> torch.Tensor:
    """Send part i of the first dimension to rank i; part i of the result came from rank i."""
    assert _group is not None
    flat = tensor.contiguous()
    exchanged: torch.Tensor = all_to_all_single_autograd(flat.flatten(0, 1), None, None, _group)
    result: torch.Tensor = exchanged.unflatten(0, flat.shape[:2])
    return result
