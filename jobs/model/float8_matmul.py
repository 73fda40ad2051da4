"""Matrix products in float8 (e4m3) with a frozen weight: one scale per row of the weight, one per token of the input.

The weight stays in float8 (Micikevicius 2022, arXiv 2209.05433). The input and its gradient are quantized in every product.

This is plain Python and not a custom operator like `quantized_linear.quantized_matmul`, so that a compiler can fuse the
quantization of the input with what produced the input, and do it once for all layers that read it. A custom operator keeps
the compiler from saving a dequantized weight; here no dequantized weight exists.
"""

from typing import Any, cast

import torch
from torch import nn

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
MULTIPLE = 16
"""torch._scaled_mm requires both dimensions of a weight to be multiples of this."""


def supports(linear: nn.Linear) -> bool:
    """Whether torch's scaled product accepts the shape of this layer's weight."""
    return not any(size % MULTIPLE for size in linear.weight.shape)


def matmul(x: torch.Tensor, weight: torch.Tensor, rows: int, absmax: torch.Tensor) -> torch.Tensor:
    """Return x @ W.T for x (..., columns), in the dtype of x; on GPUs the product itself is rounded to bf16.

    `weight` holds the e4m3 bytes of W (rows, columns), flat. `absmax` (rows, 1) or (rows,) is that of `quantize_rows`.
    """
    return cast(torch.Tensor, _Float8Matmul.apply(x, weight, rows, absmax))  # type: ignore[no-untyped-call]


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to e4m3 by rows. Returns the float8 matrix, and the largest magnitude of each row (rows, 1) in fp32.

    The largest magnitude of a row becomes the largest e4m3 number. Rows of zeros stay zeros.
    """
    matrix = matrix.float()
    absmax = matrix.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * E4M3_MAX)
    return (matrix * (E4M3_MAX / absmax)).to(E4M3), absmax


class _Float8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: int, absmax: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, absmax)
        ctx.rows = rows
        out = _scaled_matmul(x.flatten(0, -2), weight.view(E4M3).view(rows, -1).t(), absmax / E4M3_MAX, x.dtype)
        return out.view(*x.shape[:-1], rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return grad @ W.

        The scales of W's rows lie along the summed dimension here, where the kernel takes no scale. So they are multiplied
        into grad before it is quantized. The copy brings W into the column-major order that the kernel needs.
        """
        weight, absmax = ctx.saved_tensors
        column_major = weight.view(E4M3).view(ctx.rows, -1).t().contiguous().t()
        scaled_grad = grad.flatten(0, -2).float() * (absmax / E4M3_MAX)
        ones = absmax.new_ones(column_major.shape[1])
        out = _scaled_matmul(scaled_grad, column_major, ones, grad.dtype)
        return out.view(*grad.shape[:-1], column_major.shape[1]), None, None, None


def _scaled_matmul(left: torch.Tensor, right: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return left @ right in `dtype`. `right` is e4m3 in column-major order, with one scale per column.

    GPUs produce bf16. On CPUs, torch 2.11 supports only one scale per matrix, so the same numbers are multiplied in fp32.
    """
    quantized, absmax = quantize_rows(left)
    scale = absmax / E4M3_MAX
    if not left.is_cuda:
        return ((quantized.float() @ right.float()) * scale * scales).to(dtype)
    out = torch._scaled_mm(quantized, right, scale, scales[None], out_dtype=torch.bfloat16, use_fast_accum=True)
    return out.to(dtype)
