"""The table of dtypes (their sizes and names in torch, safetensors and torch.save), and casts between them.

It imports torch only if it is needed: a small merge takes less time than importing torch. So dtypes are described here, and
fp32 is rounded to bf16 with numpy.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Bytes = NDArray[np.uint8]


class Dtype(NamedTuple):
    """A dtype of torch, by its name in torch.

    It is a tuple because objects read from pickles must be immutable: a pickle could otherwise change this table.
    """

    name: str
    itemsize: int
    """Bytes per element; 0 for a dtype that is not in the table, of which only the name is known."""
    is_floating_point: bool = False

    @property
    def torch(self) -> "torch.dtype":
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle to the object in the table, also on another rank: dtypes are compared by identity, like those of torch."""
        return by_name, (self.name,)


_TABLE = (
    # torch         bytes  floating  safetensors  torch.save
    ("bool",            1, False, "BOOL",    "BoolStorage"),
    ("uint8",           1, False, "U8",      "ByteStorage"),
    ("int8",            1, False, "I8",      "CharStorage"),
    ("uint16",          2, False, "",        ""),
    ("int16",           2, False, "I16",     "ShortStorage"),
    ("uint32",          4, False, "",        ""),
    ("int32",           4, False, "I32",     "IntStorage"),
    ("complex32",       4, False, "",        ""),
    ("uint64",          8, False, "",        ""),
    ("int64",           8, False, "I64",     "LongStorage"),
    ("complex64",       8, False, "",        ""),
    ("complex128",     16, False, "",        ""),
    ("float8_e4m3fn",   1, True,  "F8_E4M3", ""),
    ("float8_e5m2",     1, True,  "F8_E5M2", ""),
    ("float8_e4m3fnuz", 1, True,  "",        ""),
    ("float8_e5m2fnuz", 1, True,  "",        ""),
    ("float8_e8m0fnu",  1, True,  "",        ""),
    ("float16",         2, True,  "F16",     "HalfStorage"),
    ("bfloat16",        2, True,  "BF16",    "BFloat16Storage"),
    ("float32",         4, True,  "F32",     "FloatStorage"),
    ("float64",         8, True,  "F64",     "DoubleStorage"),
)  # fmt: skip

TORCH = {name: Dtype(name, itemsize, floating) for name, itemsize, floating, _, _ in _TABLE}
"""By the name in torch. There is one object per dtype."""
SAFETENSORS = {label: TORCH[name] for name, _, _, label, _ in _TABLE if label}
"""By the name in a safetensors header."""
SAFETENSORS_NAMES = {dtype: label for label, dtype in SAFETENSORS.items()}
STORAGES = {storage: TORCH[name] for name, _, _, _, storage in _TABLE if storage}
"""By the storage class that torch.save writes into its pickles."""

FP32, BF16, FP16 = TORCH["float32"], TORCH["bfloat16"], TORCH["float16"]
PRECISIONS = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
"""By the name in a Muster config (train.precision, consolidate.dtype)."""


def by_name(name: str) -> Dtype:
    """The dtype with this name in torch. A name that is not in the table gives a Dtype of 0 bytes."""
    return TORCH.get(name) or Dtype(name, 0)


Cast = Callable[[Bytes, Dtype, Dtype, Bytes], Bytes]
"""(source bytes, their dtype, wanted dtype, output buffer) -> the output buffer, or the source bytes if the dtypes are equal."""

TORCH_CAST_BYTES = 12 * 10**9
"""From this many bytes on, torch is worth importing: it casts four times as fast as numpy, and importing it takes 2 s on 2 CPUs."""


@contextmanager
def best_cast(pairs: Iterable[tuple[Dtype, Dtype]], nbytes: int) -> Iterator[Cast]:
    """Yield the fastest function for these (stored, wanted) pairs and this many bytes. Torch then runs one thread per caller."""
    wanted_pairs = {(stored, wanted) for stored, wanted in pairs if stored is not wanted}
    numpy_is_faster = nbytes < TORCH_CAST_BYTES and "torch" not in sys.modules
    if not wanted_pairs or (wanted_pairs == {(FP32, BF16)} and numpy_is_faster):
        yield cast_with_numpy
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers already use every CPU
    try:
        yield cast_with_torch
    finally:
        torch.set_num_threads(threads)


def as_tensor(block: Bytes, dtype: Dtype) -> "torch.Tensor":
    """The bytes as a one-dimensional tensor that shares their memory."""
    import torch

    return torch.from_numpy(block).view(dtype.torch)


def as_bytes(tensor: "torch.Tensor") -> Bytes:
    """The bytes of a contiguous, one-dimensional tensor, sharing its memory."""
    import torch

    return tensor.view(torch.uint8).numpy()


def cast_with_torch(block: Bytes, stored: Dtype, wanted: Dtype, output: Bytes) -> Bytes:
    """Cast between any two dtypes of torch. Arguments as in `Cast`."""
    if stored is wanted:
        return block
    as_tensor(output, wanted).copy_(as_tensor(block, stored))
    return output


NUMPY_STEP = 2**18
"""Elements that numpy rounds at once: few enough to stay in the CPU cache, enough that threads seldom wait for Python's lock."""


def cast_with_numpy(block: Bytes, stored: Dtype, wanted: Dtype, output: Bytes) -> Bytes:
    """Round fp32 to bf16 to nearest, ties to even, bit for bit like torch. NaN becomes 0xFFFF, as in torch's vectorized code."""
    if stored is wanted:
        return block
    numbers, bits, rounded = block.view(np.float32), block.view(np.uint32), output.view(np.uint16)
    scratch = np.empty(min(NUMPY_STEP, bits.size), np.uint32)
    for start in range(0, bits.size, NUMPY_STEP):
        part = bits[start : start + NUMPY_STEP]
        sums = scratch[: part.size]
        # (bits + 0x7FFF + lowest kept bit) >> 16: half of the dropped range rounds up only if the kept number is odd
        np.right_shift(part, 16, out=sums)
        np.bitwise_and(sums, 1, out=sums)
        np.add(sums, 0x7FFF, out=sums)
        np.add(sums, part, out=sums)
        np.right_shift(sums, 16, out=rounded[start : start + NUMPY_STEP], casting="unsafe")
    if bits.size and np.isnan(numbers.max()):
        rounded[np.isnan(numbers)] = 0xFFFF
    return output
