"""What a low-rank adapter (LoRA, DoRA) adds to a block of rows of its base weight, in fp32; and base weights in NF4."""

from dataclasses import dataclass, replace

import torch

from conf.choices import Frozen
from jobs.model import quantized_linear


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """B @ A * scale for one base weight; with `magnitude` it is DoRA's.

    The weights of several experts lie one below the other: each has `rows_per_expert` rows and its own `rank` rows of A.
    """

    a: torch.Tensor
    """(rank, columns), fp32; with experts (experts x rank, columns)."""
    b: torch.Tensor
    """(rows, rank), fp32."""
    scale: float
    magnitude: torch.Tensor | None = None
    """(rows,), fp32: the norms of the rows of the merged weight; of its columns, if the weight is stored transposed."""
    of_columns: bool = False
    """Whether `magnitude` holds the norms of columns."""
    rows_per_expert: int = 0
    """0: the weight is one matrix."""
    first_row: int = 0
    """Row of the whole weight at which `b` begins."""

    def transposed(self) -> "LoraUpdate":
        """For weights stored as (columns, rows): embeddings and Conv1D layers."""
        return replace(self, a=self.b.T.contiguous(), b=self.a.T.contiguous(), of_columns=self.magnitude is not None)

    def rows(self, first: int, count: int) -> "LoraUpdate":
        """The update of `count` rows from `first` on, for a tensor that holds only these."""
        magnitude = (
            self.magnitude if self.magnitude is None or self.of_columns else self.magnitude[first : first + count]
        )
        return replace(self, b=self.b[first : first + count], magnitude=magnitude, first_row=self.first_row + first)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight that it is for."""
        return self.b.shape[0], self.a.shape[1]


def expert_update(a: torch.Tensor, b: torch.Tensor, scale: float, experts: int, *, transposed: bool) -> LoraUpdate:
    """The update of all experts in one weight, from PEFT's matrices: A (experts x rank, in), B (out, rank x experts).

    The weight is (experts, out, in), or with `transposed` (experts, in, out).
    """
    rank = a.shape[0] // experts
    matrices_a = a.view(experts, rank, -1)
    matrices_b = b.view(b.shape[0], rank, experts).permute(2, 0, 1)
    left, right = (matrices_a.mT, matrices_b.mT) if transposed else (matrices_b, matrices_a)
    return LoraUpdate(
        right.reshape(experts * rank, -1).contiguous(), left.reshape(-1, rank).contiguous(), scale,
        rows_per_expert=left.shape[1],
    )  # fmt: skip


class ColumnNorms:
    """The norms of the columns of a merged weight, summed up block by block: DoRA on weights that are stored transposed."""

    def __init__(self, update: LoraUpdate) -> None:
        self.update, self._squares = update, torch.zeros(update.a.shape[1], dtype=torch.float64)

    def collect(self, block: torch.Tensor, first_row: int) -> None:
        """The next rows, in fp32; they are changed."""
        add_product(block, self.update, first_row)
        self._squares += block.square().sum(0, dtype=torch.float64)

    def norms(self) -> torch.Tensor:
        """(columns,), fp32."""
        return self._squares.sqrt().float()


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


def add(block: torch.Tensor, update: LoraUpdate, first_row: int, column_norms: torch.Tensor | None = None) -> None:
    """Merge the adapter into `block` in place: fp32 (rows, columns), the rows of the weight from `first_row` on.

    `column_norms` are those of the whole weight, for an update with `of_columns`.
    """
    add_product(block, update, first_row)
    if update.magnitude is None:
        return
    if column_norms is not None:
        block.mul_(update.magnitude / column_norms)
        return
    rows = slice(first_row, first_row + block.shape[0])
    norm = torch.linalg.vector_norm(block, dim=1)
    block.mul_((update.magnitude[rows] / norm).unsqueeze(1))


def add_product(block: torch.Tensor, update: LoraUpdate, first_row: int) -> None:
    """Add B @ A * scale, without DoRA's norms."""
    if not update.rows_per_expert:
        block.addmm_(update.b[first_row : first_row + block.shape[0]], update.a, alpha=update.scale)
        return
    rank, row = update.b.shape[1], 0
    while row < block.shape[0]:
        expert, inside = divmod(update.first_row + first_row + row, update.rows_per_expert)
        count = min(block.shape[0] - row, update.rows_per_expert - inside)
        b = update.b[first_row + row : first_row + row + count]
        block[row : row + count].addmm_(b, update.a[expert * rank : (expert + 1) * rank], alpha=update.scale)
        row += count
