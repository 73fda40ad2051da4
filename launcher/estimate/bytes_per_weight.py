"""Bytes that a weight takes, by what is done with it: kept frozen in few bits, or trained by one of the optimizers; pure."""

from conf.choices import Frozen, Optimizer
from conf.schema import Config
from launcher.estimate.parameters import Counts

PACKED = {Frozen.nf4: 0.5, Frozen.int8: 1.0, Frozen.float8: 1.0}
"""Of a quantised weight of a block (jobs/model/quantized_linear.py)."""
SCALES = {Frozen.nf4: 1 / 64 + 4 / (64 * 256), Frozen.int8: 0.001, Frozen.float8: 0.001}
"""Of its scales, which every rank holds whole: a byte for 64 weights and fp32 for 256 of these, or fp32 for a row of thousands."""
MOMENTS = {
    Optimizer.adamw: 8.0,
    Optimizer.paged_adamw: 8.0,  # on the GPU as long as there is room
    Optimizer.adamw_8bit: 2.0,
    Optimizer.paged_adamw_8bit: 2.0,
    Optimizer.adafactor: 0.1,  # a row and a column instead of a matrix
}
"""Of optimizer state, for a trained weight."""


def frozen_width(config: Config, width: int) -> float:
    """Of a frozen weight in a block, in the shard that holds it."""
    return PACKED.get(config.adapter.base, width)


def frozen_bytes(config: Config, counts: Counts, width: int, shard: float) -> float:
    """Of the base under an adapter on one of `shard` ranks: embedding and head are never quantised."""
    if not counts.frozen:
        return 0
    inside = counts.frozen - counts.root
    return (width * counts.root + frozen_width(config, width) * inside) / shard + SCALES.get(
        config.adapter.base, 0
    ) * inside


def moment_bytes(config: Config, counts: Counts) -> float:
    """Of a trained weight's optimizer state, on average: Muon has one moment of matrices in blocks, AdamW two of the rest."""
    if config.train.optimizer is Optimizer.muon:
        return 4 + 4 * counts.trained_root / max(1, counts.trained)
    return MOMENTS[config.train.optimizer]
