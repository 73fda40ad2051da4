"""Dequantizes weights while they are read: 8-bit floats with scales (fp8), and gpt-oss's 4-bit floats (mxfp4).

A quantized weight becomes a StoredTensor in fp32, of which any range of elements can be read. Only the codes and scales of that
range are read. The products are those of transformers (`Fp8Dequantize`, `convert_moe_packed_tensors`): in fp32, before the cast
to the dtype of the model.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from conf import stored_quantization
from jobs.tensor_io.dtypes import FP32, TORCH, Bytes, as_tensor
from jobs.tensor_io.layout import Extent, Quantized, StoredTensor

if TYPE_CHECKING:
    import torch

Fetch = Callable[[str, int, Bytes], object]
"""Called with (file, offset, buffer): fills the buffer with the bytes at the offset."""
STEP = 2**20
"""Numbers that are made at once: 4 MiB in fp32."""
FP8 = TORCH["float8_e4m3fn"]
SCALES = ("_scale_inv", "_scale")
"""What follows the name of an fp8 weight in that of its scales: DeepSeek's name, and that of compressed-tensors."""
UNUSED = ("input_scale", "activation_scale", "k_scale", "v_scale", "q_scale", "output_scale")
"""Scales of activations: they do not belong to weights."""
MXFP4_GROUP = 32
"""Numbers that share a scale in mxfp4, in 16 bytes."""
MXFP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""By code: e2m1 of the OCP Microscaling Formats specification, section 5.3.3."""
MXFP4_BIAS = 127
"""Of the exponents that are the scales (e8m0, section 5.4.1)."""


class NotDequantized(Exception):
    """Raised for a weight whose scales are missing or do not fit; the argument says which and why."""


def dequantized(stored: Mapping[str, StoredTensor], section: Mapping[str, Any] | None) -> dict[str, StoredTensor]:
    """The tensors of a model's files, with each quantized weight as one tensor in fp32, and without scales.

    `section` is that of config.json; None if there is none. Raises NotDequantized.
    """
    if section is None or not stored_quantization.can_dequantize(section):
        return dict(stored)
    if section.get("quant_method") == "mxfp4":
        return _without_mxfp4(stored)
    block, tensors = stored_quantization.block_size(section), dict(stored)
    for name, weight in stored.items():
        if weight.dtype is not FP8:
            continue
        scales = next((name + ending for ending in SCALES if name + ending in stored), None)
        if scales is None:
            raise NotDequantized(f"{name} is stored in {FP8.name}, and {name}{SCALES[0]} is in none of the files")
        tensors[name] = _fp8(name, weight, stored[scales], block)
        del tensors[scales]
    return {name: tensor for name, tensor in tensors.items() if not _is_of_activations(name)}


def _is_of_activations(name: str) -> bool:
    return name.rpartition(".")[2] in UNUSED


def _fp8(name: str, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None) -> StoredTensor:
    """`block` is None if the number of scales says how many rows and columns share one."""
    if len(weight.shape) < 2:
        raise NotDequantized(f"{name} is stored in {FP8.name} and is not a matrix")
    rows, columns = weight.shape[-2:]
    matrices = weight.numel // max(1, rows * columns)
    if scales.numel == matrices:
        block = (rows, columns)
    elif block is None:
        grid_rows, grid_columns = [*scales.shape, 1, 1][:2] if len(scales.shape) < 2 else scales.shape[-2:]
        block = (-(-rows // max(1, grid_rows)), -(-columns // max(1, grid_columns)))
    quantized = Quantized(rows, columns, block, FP8, scales)
    grid_rows, grid_columns = quantized.scale_grid
    if not scales.dtype.is_floating_point or scales.dtype.itemsize < 2:
        raise NotDequantized(f"the scales of {name} are stored in {scales.dtype.name}")
    if scales.numel != matrices * grid_rows * grid_columns:
        found = f"{list(scales.shape)} scales for {list(weight.shape)} numbers"
        raise NotDequantized(f"{name} has {found}, which are not one for each block of {block[0]} x {block[1]}")
    return _as_numbers(weight, weight.shape, quantized)


def _without_mxfp4(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    tensors = {}
    for name, tensor in stored.items():
        base = name.removesuffix("_scales")
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            scales = stored.get(f"{base}_scales")
            if scales is None:
                raise NotDequantized(f"{name} is stored in mxfp4, and {base}_scales is in none of the files")
            tensors[base] = _mxfp4(base, tensor, scales)
        elif base == name or f"{base}_blocks" not in stored:
            tensors[name] = tensor
    return tensors


def _mxfp4(name: str, blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
    """Blocks are (experts, out, groups, 16 bytes) and scales (experts, out, groups); the weight is (experts, in, out)."""
    fits = blocks.shape[:-1] == scales.shape and len(blocks.shape) == 4 and blocks.shape[-1] == MXFP4_GROUP // 2
    if not fits or {blocks.dtype.name, scales.dtype.name} != {"uint8"}:
        found = f"{list(blocks.shape)} of {blocks.dtype.name} and {list(scales.shape)} of {scales.dtype.name}"
        raise NotDequantized(f"{name} is stored as {found}, which is not mxfp4")
    experts, rows, groups, _ = blocks.shape
    columns = groups * MXFP4_GROUP
    quantized = Quantized(rows, columns, (1, MXFP4_GROUP), blocks.dtype, scales)
    return _as_numbers(blocks, (experts, columns, rows), quantized)


def _as_numbers(codes: StoredTensor, shape: tuple[int, ...], quantized: Quantized) -> StoredTensor:
    (extent,) = codes.extents  # a tensor of a safetensors file has one
    numel = codes.numel * 8 // quantized.bits
    return StoredTensor(shape, FP32, (Extent(extent.path, extent.offset, 0, numel, quantized=quantized),))


class Dequantizer:
    """Reads numbers of quantized extents for one thread. It keeps the codes of the last expert in mxfp4."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._key: tuple[str, int] | None = None
        self._matrix: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, extent: Extent, start: int, stop: int) -> "torch.Tensor":
        """The numbers `start` to `stop` of an extent, flat, in fp32."""
        assert extent.quantized is not None
        return (self._mxfp4 if extent.quantized.bits == 4 else self._fp8)(extent, extent.quantized, start, stop)

    def _fp8(self, extent: Extent, quantized: Quantized, start: int, stop: int) -> "torch.Tensor":
        """Reads whole rows, so that each has one row of scales."""
        import torch

        columns, (grid_rows, grid_columns) = quantized.columns, quantized.scale_grid
        first, last = start // columns, -(-stop // columns)
        codes = np.empty((last - first) * columns, np.uint8)
        self._fetch(extent.path, extent.offset + first * columns, codes)
        rows = torch.arange(first, last)
        scale_rows = rows // quantized.rows * grid_rows + rows % quantized.rows // quantized.block[0]
        low, high = int(scale_rows[0]), int(scale_rows[-1]) + 1
        scales = self._scales(quantized, low * grid_columns, high * grid_columns).float().view(-1, grid_columns)
        of_columns = scales.repeat_interleave(quantized.block[1], dim=1)[:, :columns]
        numbers = as_tensor(codes, quantized.codes).view(-1, columns).float()
        numbers *= of_columns[scale_rows - low]
        return numbers.view(-1)[start - first * columns : stop - first * columns]

    def _mxfp4(self, extent: Extent, quantized: Quantized, start: int, stop: int) -> "torch.Tensor":
        import torch

        rows, size = quantized.rows, quantized.rows * quantized.columns
        parts = []
        for matrix in range(start // size, -(-stop // size)):
            begin, end = max(start, matrix * size) - matrix * size, min(stop, (matrix + 1) * size) - matrix * size
            codes, scales = self._codes_of_matrix(extent, quantized, matrix)
            # a row of the weight is a column of the stored matrix
            first, last = begin // (rows * MXFP4_GROUP), -(-end // (rows * MXFP4_GROUP))
            bytes_of_groups = codes[:, first:last].int()
            numbers = torch.stack([_mxfp4_table()[bytes_of_groups & 15], _mxfp4_table()[bytes_of_groups >> 4]], dim=-1)
            exponents = scales[:, first:last].int() - MXFP4_BIAS
            numbers = torch.ldexp(numbers.view(rows, last - first, MXFP4_GROUP), exponents.unsqueeze(-1))
            skipped = first * rows * MXFP4_GROUP
            parts.append(numbers.view(rows, -1).T.reshape(-1)[begin - skipped : end - skipped])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _codes_of_matrix(
        self, extent: Extent, quantized: Quantized, matrix: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Codes (rows, groups, 16) and scales (rows, groups) of one expert."""
        size, groups = quantized.rows * quantized.columns // 2, quantized.columns // MXFP4_GROUP
        offset = extent.offset + matrix * size
        if self._matrix is None or self._key != (extent.path, offset):
            codes = np.empty(size, np.uint8)
            self._fetch(extent.path, offset, codes)
            of_matrix = quantized.rows * groups
            scales = self._scales(quantized, matrix * of_matrix, (matrix + 1) * of_matrix)
            shape = quantized.rows, groups, MXFP4_GROUP // 2
            self._key = extent.path, offset
            self._matrix = as_tensor(codes, quantized.codes).view(shape), scales.view(shape[:2])
        return self._matrix

    def _scales(self, quantized: Quantized, start: int, stop: int) -> "torch.Tensor":
        stored = quantized.scales
        (extent,), size = stored.extents, stored.dtype.itemsize
        buffer = np.empty((stop - start) * size, np.uint8)
        self._fetch(extent.path, extent.offset + start * size, buffer)
        return as_tensor(buffer, stored.dtype)


@cache
def _mxfp4_table() -> "torch.Tensor":
    import torch

    return torch.tensor(MXFP4_NUMBERS)


def steps(extent: Extent, start: int, stop: int) -> list[tuple[int, int]]:
    """Cut the numbers of a quantized extent into ranges that are made at once: whole rows of fp8, whole groups of mxfp4."""
    assert extent.quantized is not None
    unit = extent.quantized.columns if extent.quantized.bits == 8 else extent.quantized.rows * MXFP4_GROUP
    step = max(1, STEP // unit) * unit
    edges = [start, *range((start // step + 1) * step, stop, step), stop]
    return list(zip(edges, edges[1:], strict=False))
