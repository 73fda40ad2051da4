"""Rank variables to process group and back: the one place of the compute side that reads them."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from conf.errors import Problem, SiteError
from conf.schema import Config
from jobs.distributed.rank import rank_and_world_size

log = logging.getLogger(__name__)

MARGIN_S = 60
"""By so much torch's own time-outs, which end a process without a diagnosis, come later than the watchdog's limits."""


@dataclass(frozen=True)
class World:
    """Where this rank stands, and the device it drives."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    interface: str = "?"
    """Network interface of Gloo, where it is known."""
    context_ranks: int = 1
    """Ranks that share the tokens of a row; see `jobs.distributed.context_parallel`."""
    tensor_ranks: int = 1
    """Neighbouring ranks that share every matrix of a block."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def copies(self) -> int:
        """Ranks that work on the same rows."""
        return self.context_ranks * self.tensor_ranks

    @property
    def data_rank(self) -> int:
        """Of the ranks that work on other rows, which this one is among."""
        return self.rank // self.copies

    @property
    def data_size(self) -> int:
        return self.size // self.copies

    @property
    def share(self) -> tuple[int, int]:
        """(which, of how many) stretches of a row's tokens this rank has."""
        return self.rank // self.tensor_ranks % self.context_ranks, self.context_ranks


@contextmanager
def process_group(config: Config) -> Iterator[World]:
    """Join the ranks of this job; NCCL where the config asks for GPUs, else Gloo. A process started alone is a world of 1.

    Raises SiteError when GPUs were asked for and this rank has none.
    """
    rank, size = rank_and_world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size == 1:  # a rendezvous with oneself needs no network
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    device = _device(config, local_rank)
    network = config.cluster.network
    start_s = int(os.environ.get("MUSTER_NCCL_TIMEOUT", network.nccl_timeout_s))
    timeout = timedelta(seconds=max(start_s, network.step_timeout_s, network.save_timeout_s) + MARGIN_S)
    if device.type == "cuda":
        _peer_access(local_rank, local_size)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    # transformers would leave weights out on all ranks but the first; Muster's ranks read for themselves
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    yield World(
        rank,
        size,
        local_rank,
        local_size,
        device,
        os.environ.get("GLOO_SOCKET_IFNAME", "?"),
        config.parallel.context_ranks,
        config.parallel.tensor_ranks,
    )
    # On the good path only: a rank that fails must say why, not wait in here for ranks that wait for it
    dist.barrier()  # no rank leaves while another still needs its store
    dist.destroy_process_group()


def _device(config: Config, local_rank: int) -> torch.device:
    if not config.cluster.train.gpus_per_node:
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank:
        raise SiteError(
            Problem(
                "cluster.train.gpus_per_node",
                config.cluster.train.gpus_per_node,
                f"local rank {local_rank} on {socket.gethostname()} sees {torch.cuda.device_count()} GPUs "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}, torch {torch.__version__}): ask for "
                "fewer, look at nvidia-smi on that node, or exclude it with cluster.train.exclude",
            )
        )
    return torch.device("cuda", local_rank)


def _peer_access(local_rank: int, local_size: int) -> None:
    """Consumer cards lack peer access and hang in NCCL's first collective; what the user has set stays."""
    others = [other for other in range(min(local_size, torch.cuda.device_count())) if other != local_rank]
    if "NCCL_P2P_DISABLE" not in os.environ and not all(
        torch.cuda.can_device_access_peer(local_rank, other) for other in others
    ):
        os.environ["NCCL_P2P_DISABLE"] = "1"
        log.info("no peer access between this node's GPUs: NCCL_P2P_DISABLE=1")


def set_timeout(seconds: int) -> None:
    """From now on a collective that takes much longer than this ends its rank, in any group of NCCL's. Gloo's stay as made."""
    for group in list(dist.distributed_c10d._world.pg_map):  # torch gives groups of a mesh ten minutes of their own
        if "nccl" in dist.get_backend_config(group):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds + MARGIN_S), group)


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, on every rank."""
    dist.all_reduce(value)
    return value
