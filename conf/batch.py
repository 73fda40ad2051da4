"""How a global batch is split: pure arithmetic that the launcher, DeepSpeed and the training loop must agree on."""

from conf.schema import Config


def copies(config: Config) -> int:
    """Ranks that work on the same rows."""
    return config.parallel.context_ranks * config.parallel.tensor_ranks


def rows_at_once(config: Config) -> int:
    """`train.micro_batch`, and one where nobody has chosen it."""
    return config.train.micro_batch or 1


def split(config: Config, world_size: int) -> tuple[int, int]:
    """(rows of a micro batch, micro batches a step) of each rank, or of the ranks that share rows.

    The micro batch is the largest that divides a rank's rows and is at most `train.micro_batch`, so that one value serves
    any number of ranks. `train.global_batch` must be divisible by the ranks that have rows of their own;
    `launcher.check.rules` sees
    to it.
    """
    rows = config.train.global_batch // (world_size // copies(config))
    micro = next(size for size in range(min(rows_at_once(config), rows), 0, -1) if rows % size == 0)
    return micro, rows // micro
