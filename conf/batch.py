"""How a global batch is split: pure arithmetic that the launcher, DeepSpeed and the training loop must agree on."""

from conf.schema import Config


def split(config: Config, world_size: int) -> tuple[int, int]:
    """(rows of a micro batch, micro batches a step) of each rank.

    The micro batch is the largest that divides a rank's rows and is at most `train.micro_batch`, so that one value serves
    any number of ranks. `train.global_batch` must be divisible by `world_size`; `launcher.checks` sees to it.
    """
    rows = config.train.global_batch // world_size
    micro = next(size for size in range(min(config.train.micro_batch, rows), 0, -1) if rows % size == 0)
    return micro, rows // micro
