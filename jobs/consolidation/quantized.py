"""Refuses to write quantized weights without the scales that belong to them."""

import re
from collections.abc import Iterable, Mapping

from conf.errors import DataError, Problem
from jobs.consolidation.plan import Output
from jobs.tensor_io.layout import StoredTensor

_SCALES = re.compile(
    r"(^|[._])(weight_scale(_inv)?|scale_inv|input_scale|weight_scale_2|absmax|nested_absmax|quant_map|quant_state|SCB|scales"
    r"|qweight|qzeros|g_idx|weight_packed|weight_shape|weight_format)([._]|$)"
)
"""Parts of names that go with weights in fp8, 8 or 4 bits: DeepSeek, compressed-tensors, bitsandbytes, GPTQ, AWQ, gpt-oss."""


def check_no_cast(outputs: Iterable[Output], sources: Mapping[str, StoredTensor]) -> None:
    """Raise DataError if a weight in fp8, or the scale of a quantized weight, would be cast to another dtype."""
    for output in outputs:
        stored = sources[output.source]
        is_fp8 = stored.dtype.is_floating_point and stored.dtype.itemsize == 1
        if output.dtype is stored.dtype or not (is_fp8 or _SCALES.search(output.name)):
            continue
        message = (
            f"{output.name} is stored in {stored.dtype.name} and belongs to quantized weights, whose numbers mean nothing without "
            f"their scales, so it is not cast to {output.dtype.name}: keep it as it is with --dtype original and no --base, "
            "or load and dequantize the model with the library that quantized it"
        )
        raise DataError(Problem("checkpoint", None, message))
