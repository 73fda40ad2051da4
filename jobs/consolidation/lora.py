"""What a low-rank adapter (LoRA, rsLoRA, DoRA) adds to a block of rows of its base weight, in fp32; and base weights in NF4."""

from dataclasses import dataclass
from math import sqrt

import torch

from conf.choices import Frozen
from jobs.model import quantized_linear


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """B @ A * scale for one base weight; with `magnitude` it is DoRA's."""

    a: torch.Tensor
    """(rank, columns), fp32."""
    b: torch.Tensor
    """(rows, rank), fp32."""
    scale: float
    magnitude: torch.Tensor | None = None
    """(rows,), fp32: the norms of the rows of the merged weight."""

    def transposed(self) -> "LoraUpdate":
        """For weights stored as (columns, rows): embeddings and Conv1D layers."""
        return LoraUpdate(self.b.T.contiguous(), self.a.T.contiguous(), self.scale, self.magnitude)


class Nf4Rounder:
    """Rounds a weight to NF4 as training had it (`adapter.base=nf4`), block by block of its flat elements.

    Call `collect_scales` for all blocks in order, then `finish_scales` once, then `round` for any block. The scales are quantized
    too, so they depend on the whole weight.
    """

    block = quantized_linear.BLOCK

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: the compute dtype, in which training quantized and unpacked the weight."""
        self.dtype, self._collected, self._absmax = dtype, list[torch.Tensor](), torch.empty(0)

    def collect_scales(self, elements: torch.Tensor) -> None:
        """The next elements: a multiple of 64, except at the end of the weight."""
        quantized = quantized_linear.quantize(Frozen.nf4, elements.to(self.dtype), quantized_linear.BLOCK)
        self._collected.append(quantized.absmax)

    def finish_scales(self) -> None:
        """Quantize the collected scales, as double quantization does. Call it once, after the last block."""
        self._absmax = quantized_linear.double_quantized_absmax(torch.cat(self._collected))

    def round(self, elements: torch.Tensor, start: int) -> torch.Tensor:
        """The elements from `start` on, in the compute dtype. `start` and their number are multiples of 64."""
        packed = quantized_linear.quantize(Frozen.nf4, elements.to(self.dtype), quantized_linear.BLOCK).packed
        first = start // quantized_linear.BLOCK
        absmax = self._absmax[first : first + elements.numel() // quantized_linear.BLOCK]
        return quantized_linear.dequantize_nf4(packed, absmax, (1, elements.numel()), self.dtype).view(-1)


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / r for LoRA, alpha / sqrt(r) for rank-stabilized LoRA (Kalajdzievski 2023)."""
    return alpha / (sqrt(rank) if rslora else rank)


def add(block: torch.Tensor, update: LoraUpdate, first_row: int) -> None:
    """Merge the adapter into `block` in place: fp32 (rows, columns), the rows of the weight from `first_row` on."""
    rows = slice(first_row, first_row + block.shape[0])
    block.addmm_(update.b[rows], update.a, alpha=update.scale)
    if update.magnitude is not None:
        norm = torch.linalg.vector_norm(block, dim=1)
        block.mul_((update.magnitude[rows] / norm).unsqueeze(1))
