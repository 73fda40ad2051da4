"""Splits a global batch into micro batches: arithmetic on which the launcher, DeepSpeed and the training loop must agree."""

from conf.schema import Config


def ranks_per_row(config: Config) -> int:
    """Ranks that work on the same rows, because they share the tokens of each row or the matrices of each block."""
    return config.parallel.context_ranks * config.parallel.tensor_ranks


def micro_batch_limit(config: Config) -> int:
    """`train.micro_batch`, in rows; 1 if it is null and nothing was chosen."""
    return config.train.micro_batch or 1


def split(config: Config, world_size: int) -> tuple[int, int]:
    """(rows of a micro batch, micro batches per step) of each rank, or of each group of ranks that share their rows.

    The micro batch is the largest divisor of the rank's rows per step that is at most `train.micro_batch`, so that one value
    works with any number of ranks. `train.global_batch` must be divisible by the number of ranks or groups;
    `launcher.check.parallel_rules` checks that.
    """
    rows = config.train.global_batch // (world_size // ranks_per_row(config))
    largest = min(micro_batch_limit(config), rows)
    micro = next(size for size in range(largest, 0, -1) if rows % size == 0)
    return micro, rows // micro
