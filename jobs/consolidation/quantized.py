"""Dequantizes the weights of a base; refuses to write quantized weights without the scales that belong to them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from conf import stored_quantization
from conf.errors import DataError, Problem
from jobs.consolidation.plan import Output
from jobs.consolidation.weight_names import is_from_base
from jobs.tensor_io import dequantize, safetensors
from jobs.tensor_io.dtypes import Dtype
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.untrusted import read_object

_SCALES = re.compile(
    r"(^|[._])(weight_scale(_inv)?|scale_inv|input_scale|weight_scale_2|absmax|nested_absmax|quant_map|quant_state|SCB|scales"
    r"|qweight|qzeros|g_idx|weight_packed|weight_shape|weight_format)([._]|$)"
)
"""Parts of names that go with weights in fp8, 8 or 4 bits: DeepSeek, compressed-tensors, bitsandbytes, GPTQ, AWQ, gpt-oss."""


def find_dequantized(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder. Weights that are stored in fp8 or mxfp4 are among them as numbers in fp32.

    Raises DataError if a file is damaged, or if scales are missing. Other quantized weights stay as they are stored.
    """
    return dequantized(safetensors.find_tensors(folder), folder)


def dequantized(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The same for tensors of this folder: its config.json says how they are stored."""
    section = stored_quantization.find(read_object(folder / "config.json") or {})
    try:
        return dequantize.dequantized(tensors, section)
    except dequantize.NotDequantized as error:
        raise DataError(Problem("model", folder, f"{error}: copy or download it again")) from error


def check_no_cast(outputs: Iterable[Output], sources: Mapping[str, StoredTensor]) -> None:
    """Raise DataError if a weight in fp8 or the scale of a quantized weight would be cast, or another weight to fp8."""
    for output in outputs:
        stored = sources[output.source]
        if output.dtype is stored.dtype:
            continue
        if _is_fp8(output.dtype):
            message = (
                f"{output.name} would be cast to {output.dtype.name} without a scale, as the base has it: set a dtype"
            )
            raise DataError(Problem("--dtype", "original", message))
        if _is_fp8(stored.dtype) or _SCALES.search(output.name):
            fp8 = "copy the config.json beside it that says how it is quantized, or " if _is_fp8(stored.dtype) else ""
            message = (
                f"{output.name} is stored in {stored.dtype.name} and belongs to quantized weights, whose numbers mean nothing "
                f"without their scales, so it is not cast to {output.dtype.name}: {fp8}keep it as it is with --dtype original and "
                "no --base, or load and dequantize the model with the library that quantized it"
            )
            raise DataError(Problem("checkpoint", None, message))


def check_base(outputs: Iterable[Output], base: Mapping[str, StoredTensor]) -> None:
    """Raise DataError if weights come from a base that is quantized: they cannot be taken from there without their scales."""
    if not any(is_from_base(output.source) for output in outputs):
        return
    for name, stored in base.items():
        if _is_fp8(stored.dtype) or _SCALES.search(name):
            message = (
                f"{name} belongs to quantized weights: name the same model in bf16, or dequantize it and save it first"
            )
            raise DataError(Problem("model.source", None, f"cannot serve weights, because {message}"))


def _is_fp8(dtype: Dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
