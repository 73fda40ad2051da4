"""Creates the process group of a job from the rank variables (RANK, LOCAL_RANK, ...), and destroys it at the end."""

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
"""Torch's own time-outs are this much longer than the watchdog's limits: torch would end a process without a diagnosis."""


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process, and how many ranks share rows and matrices."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    interface: str = "?"
    """Network interface that Gloo uses; `?` if it is not known."""
    context_ranks: int = 1
    """Ranks that share the tokens of a row; see `jobs.distributed.context_parallel`."""
    tensor_ranks: int = 1
    """Neighboring ranks that share every matrix of a block; see `jobs.backends.tensor_parallel`."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def ranks_per_group(self) -> int:
        """Number of ranks that work on the same rows: one group of context-parallel and tensor-parallel ranks."""
        return self.context_ranks * self.tensor_ranks

    @property
    def data_rank(self) -> int:
        """Index of this rank's group: its rank for data parallelism."""
        return self.rank // self.ranks_per_group

    @property
    def data_size(self) -> int:
        """Number of groups: the world size for data parallelism."""
        return self.size // self.ranks_per_group

    @property
    def context_part(self) -> tuple[int, int]:
        """(index, count): this rank has part `index` of `count` equal parts of every row's tokens."""
        return self.rank // self.tensor_ranks % self.context_ranks, self.context_ranks


@contextmanager
def process_group(config: Config) -> Iterator[World]:
    """Join the process group of this job: NCCL if the config has GPUs, else Gloo. A process started alone has world size 1.

    Raises SiteError if the config has GPUs and this rank sees none.
    """
    rank, size = rank_and_world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size == 1:  # one process needs no network
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    device = _device(config, local_rank)
    network = config.cluster.network
    start_s = int(os.environ.get("MUSTER_NCCL_TIMEOUT", network.nccl_timeout_s))
    timeout = timedelta(seconds=max(start_s, network.step_timeout_s, network.save_timeout_s) + MARGIN_S)
    if device.type == "cuda":
        _peer_access(device.index, local_size)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    # With true, transformers would load weights on rank 0 only; in Muster every rank reads its own part
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
    # Not in a `finally`: a rank that fails must exit with its error. In the barrier it would wait for ranks that wait for it.
    dist.barrier()  # no rank may leave while another one still needs its store
    dist.destroy_process_group()


def _device(config: Config, local_rank: int) -> torch.device:
    """The device of this rank: the GPU of its local rank, or the only one that it sees (`--gpus-per-task`, `--gpu-bind`)."""
    if not config.cluster.train.gpus_per_node:
        return torch.device("cpu")
    if torch.cuda.device_count() == 1:  # if several ranks see the same one, NCCL says so
        return torch.device("cuda", 0)
    if torch.cuda.device_count() <= local_rank:
        raise SiteError(
            Problem(
                "cluster.train.gpus_per_node",
                config.cluster.train.gpus_per_node,
                f"local rank {local_rank} on {socket.gethostname()} sees only {torch.cuda.device_count()} GPUs "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}, torch {torch.__version__}): "
                "request fewer GPUs, let each rank see all GPUs of its node (cluster.srun_args=[--gpu-bind=none]), run "
                "nvidia-smi or rocm-smi on that node, or exclude the node with cluster.train.exclude",
            )
        )
    return torch.device("cuda", local_rank)


def _peer_access(index: int, local_size: int) -> None:
    """Set NCCL_P2P_DISABLE=1 if GPUs have no peer access (consumer cards hang in NCCL's first collective). A user's value stays."""
    others = [other for other in range(min(local_size, torch.cuda.device_count())) if other != index]
    if "NCCL_P2P_DISABLE" not in os.environ and not all(
        torch.cuda.can_device_access_peer(index, other) for other in others
    ):
        os.environ["NCCL_P2P_DISABLE"] = "1"
        log.info("the GPUs of this node have no peer access: set NCCL_P2P_DISABLE=1")


def set_timeout(seconds: int) -> None:
    """Set the time-out of collectives to `seconds` plus MARGIN_S in all NCCL groups. Gloo's groups keep theirs.

    A collective that takes longer ends its rank.
    """
    # all groups, because those of a device mesh get torch's default of ten minutes
    for group in list(dist.distributed_c10d._world.pg_map):
        if "nccl" in dist.get_backend_config(group):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds + MARGIN_S), group)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum `value` over all ranks, in place, and return it. Collective: all ranks call this."""
    dist.all_reduce(value)
    return value
