"""Bytes per weight: frozen in few bits, or trained by one of the optimizers; pure."""

from conf.bytes_per_weight import MOMENT_BYTES
from conf.choices import Frozen, Optimizer
from conf.schema import Config
from launcher.estimate.parameters import Counts

QUANTIZED_BYTES = {Frozen.nf4: 0.5, Frozen.int8: 1.0, Frozen.float8: 1.0}
"""Bytes of one quantized weight in a block (jobs/model/quantized_linear.py)."""
SCALE_BYTES = {Frozen.nf4: 1 / 64 + 4 / (64 * 256), Frozen.int8: 0.001, Frozen.float8: 0.001}
"""Bytes of scale per weight, which every rank holds whole. NF4: one byte per 64 weights plus fp32 per 16,384 (double
quantization). int8 and float8: one fp32 per row of a weight, which has thousands of numbers."""


def frozen_width(config: Config, width: int) -> float:
    """Bytes of one frozen weight in a block; `width` is that of the compute precision."""
    return QUANTIZED_BYTES.get(config.adapter.base, width)


def frozen_bytes(config: Config, counts: Counts, width: int, shard: float) -> float:
    """Bytes of the base under an adapter on one of `shard` ranks. Embedding and output head are never quantized."""
    if not counts.frozen:
        return 0
    in_blocks = counts.frozen - counts.root
    sharded = (width * counts.root + frozen_width(config, width) * in_blocks) / shard
    return sharded + SCALE_BYTES.get(config.adapter.base, 0) * in_blocks


def moment_bytes(config: Config, counts: Counts) -> float:
    """Bytes of optimizer state per trained weight, on average.

    Muon keeps one fp32 moment for the matrices of blocks, and AdamW's two for all other weights.
    """
    if config.train.optimizer is Optimizer.muon:
        return MOMENT_BYTES[Optimizer.muon] + 4 * counts.trained_root / max(1, counts.trained)
    return MOMENT_BYTES[config.train.optimizer]
