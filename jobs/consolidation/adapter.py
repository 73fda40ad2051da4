"""What a low-rank adapter adds to a block of rows of its base weight, in fp32: LoRA, rsLoRA, DoRA."""

from dataclasses import dataclass
from math import sqrt

import torch


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
