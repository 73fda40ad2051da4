"""Matrix products in 8 bits with a frozen weight: e4m3 numbers (Micikevicius 2022, arXiv 2209.05433), one scale a row of the
weight and one a token. The weight is kept in 8 bits; what comes in, and its gradient, are brought to 8 bits each time.

Written out rather than made an operator, as `quantised.product` is: a compiler then scales what comes in where it is made, and
once for all layers that read it. It cannot keep the weight unpacked, which it never is.
"""

from typing import Any, cast

import torch
from torch import nn

CAPABILITY = (8, 9)
"""Of Ada, the first GPUs with such products; Hopper has 9.0."""
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
MULTIPLE = 16
"""What torch's scaled product wants both widths of a weight to be a multiple of."""


def supports(linear: nn.Linear) -> bool:
    """Whether torch's scaled product takes a layer's weight."""
    return not any(size % MULTIPLE for size in linear.weight.shape)


def matmul(x: torch.Tensor, weight: torch.Tensor, rows: int, absmax: torch.Tensor) -> torch.Tensor:
    """x @ W.T in the dtype of x (..., columns), on GPUs by way of bf16; `weight` is W's bytes, flat, `absmax` (rows) as
    `numbers` gives it."""
    return cast(torch.Tensor, _Product.apply(x, weight, rows, absmax))  # type: ignore[no-untyped-call]


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in 8 bits, and the largest magnitude of each row (rows, 1) in fp32, which becomes the largest number; rows of
    zeros stay zeros."""
    matrix = matrix.float()
    absmax = matrix.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST)
    return (matrix * (LARGEST / absmax)).to(E4M3), absmax


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: int, absmax: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, absmax)
        ctx.rows = rows
        found = _multiplied(x.flatten(0, -2), weight.view(E4M3).view(rows, -1).t(), absmax / LARGEST, x.dtype)
        return found.view(*x.shape[:-1], rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """grad @ W, whose scales lie along the sum and so are multiplied into grad. The product reads W by columns."""
        weight, absmax = ctx.saved_tensors
        matrix = weight.view(E4M3).view(ctx.rows, -1).t().contiguous().t()
        scaled = grad.flatten(0, -2).float() * (absmax / LARGEST)
        found = _multiplied(scaled, matrix, absmax.new_ones(matrix.shape[1]), grad.dtype)
        return found.view(*grad.shape[:-1], matrix.shape[1]), None, None, None


def _multiplied(left: torch.Tensor, right: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`; `right` lies in memory by columns, each of which has a scale.

    GPUs give bf16. On CPUs torch 2.11 takes one scale a matrix only, so there the same numbers are multiplied in fp32.
    """
    small, absmax = quantize_rows(left)
    scale = absmax / LARGEST
    if not left.is_cuda:
        return ((small.float() @ right.float()) * scale * scales).to(dtype)
    made = torch._scaled_mm(small, right, scale, scales[None], out_dtype=torch.bfloat16, use_fast_accum=True)
    return made.to(dtype)
