"""The bytes that each optimizer keeps for a trained weight."""

from conf.choices import Optimizer

MOMENT_BYTES = {
    Optimizer.adamw: 8.0,
    Optimizer.paged_adamw: 8.0,  # on the GPU while there is room
    Optimizer.adamw_8bit: 2.0,
    Optimizer.paged_adamw_8bit: 2.0,
    Optimizer.adafactor: 0.1,  # one row and one column instead of a matrix
    Optimizer.muon: 4.0,  # of a matrix in a block; all other weights are trained by AdamW
}
"""Bytes of optimizer state per trained weight."""
