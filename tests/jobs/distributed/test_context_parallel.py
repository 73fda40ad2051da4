"""If several ranks share rows, loss and gradients equal those of whole rows in one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.choices import Attention
from conf.errors import ConfigError
from jobs.data import batches
from jobs.distributed import context_parallel
from jobs.distributed.process_group import World
from jobs.model import attention
from jobs.training import loss
from tests.jobs.networks import network, rows
from tests.jobs.ranks import spawn

LENGTHS = [5, 13, 3, 20, 9, 16]


def _shared(rank: int, size: int, kind: str) -> None:
    dist.init_process_group("gloo")
    world = World(rank, size, rank, size, torch.device("cpu"), context_ranks=size)
    for pack_into in (None, 24):
        found = rows(LENGTHS, pack_into)
        every = np.arange(len(found))
        whole = network(kind, num_attention_heads=4, num_key_value_heads=2)  # fewer key heads than four ranks
        context_parallel.create_groups(whole.config, World(rank, size, rank, size, torch.device("cpu")))
        expected = loss.summed_cross_entropy(whole, batches.collate(found, every, pad=0))
        expected.backward()
        part = network(kind, attention=attention.NAMES[Attention.varlen], num_attention_heads=4, num_key_value_heads=2)
        context_parallel.create_groups(part.config, world)
        batch = batches.collate(found, every, pad=0, context_part=world.context_part)
        mine = loss.summed_cross_entropy(part, batch)
        mine.backward()
        summed = mine.detach().clone()
        dist.all_reduce(summed)
        assert summed.item() == pytest.approx(expected.item(), rel=1e-5)
        for (name, one), other in zip(part.named_parameters(), whole.parameters(), strict=True):
            dist.all_reduce(one.grad)
            assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-4), (name, pack_into)
    dist.barrier()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.proof)])
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.proof)])
def test_loss_and_gradients_are_those_of_whole_rows(size, kind) -> None:
    spawn(_shared, size, size, kind)


def test_the_parts_of_a_row_make_up_the_row() -> None:
    found = rows(LENGTHS, 24)
    every = np.arange(len(found))
    whole = batches.collate(found, every, pad=0, multiple=24)
    parts = [batches.collate(found, every, pad=0, context_part=(which, 3)) for which in range(3)]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))
    assert sum(len(part.trained) for part in parts) == len(whole.trained)
    assert all(torch.equal(part.cu_seqlens, whole.cu_seqlens) for part in parts)


def test_heads_that_cannot_be_divided_are_an_error() -> None:
    with pytest.raises(ConfigError, match="parallel.context_ranks=3"):
        context_parallel.create_groups(network().config, World(0, 3, 0, 3, torch.device("cpu"), context_ranks=3))
