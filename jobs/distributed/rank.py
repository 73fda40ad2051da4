"""Which of how many processes this one is: what even those need to know that import no torch."""

import os


def place() -> tuple[int, int]:
    """(rank, world size) of this process, as whoever started it says; (0, 1) where nobody does."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def node() -> tuple[int, int]:
    """(rank on its node, rank of its node) of this process; (0, 0) where nobody says it."""
    return int(os.environ.get("LOCAL_RANK", "0")), place()[0] // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
