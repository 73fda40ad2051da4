"""What a low-rank adapter adds to a block of rows of its base weight, in fp32: LoRA, rsLoRA, DoRA; and that base in NF4."""

from dataclasses import dataclass
from math import sqrt

import torch

from conf.choices import Frozen
from jobs.model import quantized_linear


@dataclass(frozen=True, eq=False)
class Update:
    """B @ A * scale for one base weight; `magnitude` makes it DoRA's."""

    a: torch.Tensor
    """(rank, columns), fp32."""
    b: torch.Tensor
    """(rows, rank), fp32."""
    scale: float
    magnitude: torch.Tensor | None = None
    """(rows,), fp32: the norms that the rows of the merged weight have."""

    def transposed(self) -> "Update":
        """For weights stored as (columns, rows): embeddings and Conv1D layers."""
        return Update(self.b.T.contiguous(), self.a.T.contiguous(), self.scale, self.magnitude)


class Nf4:
    """A weight as training had it (`adapter.base=nf4`), block by block of its flat elements: look at all, settle, round any."""

    block = quantized_linear.BLOCK

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: of compute, in which it was quantised and unpacked."""
        self.dtype, self._seen, self._absmax = dtype, list[torch.Tensor](), torch.empty(0)

    def look(self, block: torch.Tensor) -> None:
        """The next elements: a multiple of 64, but for the last."""
        self._seen.append(quantized_linear.quantize(Frozen.nf4, block.to(self.dtype), quantized_linear.BLOCK).absmax)

    def settle(self) -> None:
        self._absmax = quantized_linear.double_quantized_absmax(torch.cat(self._seen))

    def round(self, block: torch.Tensor, start: int) -> torch.Tensor:
        """Elements from `start` on, both multiples of 64, in the precision of compute."""
        packed = quantized_linear.quantize(Frozen.nf4, block.to(self.dtype), quantized_linear.BLOCK).packed
        first = start // quantized_linear.BLOCK
        absmax = self._absmax[first : first + block.numel() // quantized_linear.BLOCK]
        return quantized_linear.dequantize_nf4(packed, absmax, (1, block.numel()), self.dtype).view(-1)


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / r; rank-stabilised LoRA divides by its root."""
    return alpha / (sqrt(rank) if rslora else rank)


def add(block: torch.Tensor, update: Update, row: int) -> None:
    """Merge into `block`, fp32 (rows, columns) from the row `row` of the weight on, in place."""
    rows = slice(row, row + block.shape[0])
    block.addmm_(update.b[rows], update.a, alpha=update.scale)
    if update.magnitude is not None:
        norm = torch.linalg.vector_norm(block, dim=1)
        block.mul_((update.magnitude[rows] / norm).unsqueeze(1))
