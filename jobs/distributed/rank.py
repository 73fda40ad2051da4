"""Reads this process's rank and world size from the environment, without importing torch."""

import os


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world size) of this process, from RANK and WORLD_SIZE; (0, 1) where they are not set."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_and_node_rank() -> tuple[int, int]:
    """(rank within its node, rank of its node) of this process; (0, 0) where the environment has no ranks."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return local_rank, rank_and_world_size()[0] // local_size
