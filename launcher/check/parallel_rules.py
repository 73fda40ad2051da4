"""Checks that layout, batch size and model shape divide over the ranks of the train job; pure.

All functions need numbers within their bounds: they divide by them.
"""

import math
from collections.abc import Iterator

from conf.batch import ranks_per_row
from conf.choices import AdapterKind, Attention, Backend
from conf.errors import Problem, as_typed
from conf.schema import Config

CONTEXT_ATTENTION = (Attention.auto, Attention.cudnn, Attention.varlen)
"""Values of `model.attention` that support `parallel.context_ranks` above 1."""


def batch(config: Config) -> Iterator[Problem]:
    """`train.global_batch` must be divisible by the ranks, or by the groups of ranks that share their rows."""
    world, rows, sharing = config.cluster.train.ranks, config.train.global_batch, ranks_per_row(config)
    groups = world // math.gcd(world, sharing)  # `shared_rows_and_matrices` reports where `sharing` does not divide
    if rows % groups:
        nearest = " or ".join(str(count * groups) for count in (rows // groups, rows // groups + 1) if count)
        of = f"{groups} ranks" if sharing == 1 else f"{groups} groups of {sharing} ranks"
        yield Problem("train.global_batch", rows, f"must be divisible by the {of} of cluster.train. Use {nearest}")


def layout(config: Config) -> Iterator[Problem]:
    """Yield problems of the `parallel` section by itself, and with the number of ranks."""
    return _zero(config) if config.parallel.backend is Backend.zero else _fsdp(config)


def _zero(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.zero_stage not in (1, 2, 3):
        message = "must be 1, 2 or 3. Use parallel=ddp to train without sharding"
        yield Problem("parallel.zero_stage", parallel.zero_stage, message)
    if parallel.offload_parameters and parallel.zero_stage != 3:
        message = "needs parallel.zero_stage=3, because only stage 3 shards parameters. Use parallel=zero3_offload"
        yield Problem("parallel.offload_parameters", True, message)
    if parallel.shard_ranks is not None:
        message = "works with FSDP only. ZeRO always shards over all ranks. Set it to null, or use parallel=fsdp"
        yield Problem("parallel.shard_ranks", parallel.shard_ranks, message)
    if parallel.tensor_ranks > 1:
        message = "works with FSDP only. Use parallel=fsdp or parallel.tensor_ranks=1"
        yield Problem("parallel.tensor_ranks", parallel.tensor_ranks, message)


def _fsdp(config: Config) -> Iterator[Problem]:
    parallel, ranks_per_node, world = config.parallel, config.cluster.train.ranks_per_node, config.cluster.train.ranks
    shardable = world // parallel.tensor_ranks
    if ranks_per_node % parallel.tensor_ranks:
        message = (
            f"must divide cluster.train.ranks_per_node={ranks_per_node}, because tensor parallelism communicates "
            f"at every matrix and must stay inside a node. Use {_divisors(ranks_per_node)}"
        )
        yield Problem("parallel.tensor_ranks", parallel.tensor_ranks, message)
    elif shardable % (parallel.shard_ranks or 1):
        by_tensor = f" / {parallel.tensor_ranks} (parallel.tensor_ranks)" if parallel.tensor_ranks > 1 else ""
        message = f"must divide the {world} ranks of cluster.train{by_tensor}. Use {_divisors(shardable)}"
        yield Problem("parallel.shard_ranks", parallel.shard_ranks, message)
    elif parallel.offload_optimizer != parallel.offload_parameters:
        message = (
            f"must equal parallel.offload_parameters={as_typed(parallel.offload_parameters)}, because FSDP keeps optimizer state "
            "where the parameters are. Use parallel=fsdp_offload or parallel=fsdp"
        )
        yield Problem("parallel.offload_optimizer", parallel.offload_optimizer, message)


def shared_rows_and_matrices(config: Config) -> Iterator[Problem]:
    """Context parallelism (ranks share the tokens of a row) and tensor parallelism (ranks share a matrix)."""
    parallel, world = config.parallel, config.cluster.train.ranks
    if world % ranks_per_row(config):
        message = (
            f"parallel.context_ranks x parallel.tensor_ranks = {ranks_per_row(config)} must divide "
            f"the {world} ranks of cluster.train. Lower parallel.context_ranks or parallel.tensor_ranks"
        )
        yield Problem("parallel.context_ranks", parallel.context_ranks, message)
    if parallel.context_ranks > 1 and config.model.attention not in CONTEXT_ATTENTION:
        message = f"does not support parallel.context_ranks={parallel.context_ranks}. Use model.attention=auto"
        yield Problem("model.attention", config.model.attention.name, message)
    if shape := config.model.architecture:
        for key, heads in (("context_ranks", "num_attention_heads"), ("tensor_ranks", "num_key_value_heads")):
            ranks, count = getattr(parallel, key), getattr(shape, heads)
            if count % ranks:
                message = f"must divide model.architecture.{heads}={count}, because each rank takes the same number of heads. "
                yield Problem(f"parallel.{key}", ranks, f"{message}Use {_divisors(count)}")
    if parallel.tensor_ranks > 1 and config.adapter.kind is not AdapterKind.none:
        message = "does not support adapters. Use adapter=none or parallel.tensor_ranks=1"
        yield Problem("parallel.tensor_ranks", parallel.tensor_ranks, message)


def _divisors(number: int) -> str:
    """`1, 2, 4 or 8`."""
    *first, last = [str(size) for size in range(1, number + 1) if number % size == 0]
    return f"{', '.join(first)} or {last}" if first else last
