"""What numbers are stored as, and casts between them, for merges that end before torch would have been imported."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np


class Dtype(NamedTuple):
    """Stands for one of torch's, under its name. A tuple, for those who unpickle it cannot change a tuple."""

    name: str
    itemsize: int
    is_floating_point: bool = False

    @property
    def torch(self) -> Any:
        import torch

        return getattr(torch, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        """The one object of its name, also in another rank: dtypes are compared by identity, as torch's are."""
        return named, (self.name,)


def named(name: str) -> Dtype:
    return EVERY[name]


EVERY = {
    dtype.name: dtype
    for size, real, names in (
        (1, False, ("bool", "uint8", "int8")),
        (2, False, ("uint16", "int16")),
        (4, False, ("uint32", "int32", "complex32")),
        (8, False, ("uint64", "int64", "complex64")),
        (16, False, ("complex128",)),
        (1, True, ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")),
        (2, True, ("float16", "bfloat16")),
        (4, True, ("float32",)),
        (8, True, ("float64",)),
    )
    for dtype in (Dtype(name, size, real) for name in names)
}
"""By torch's names. There is one object of each."""
FP32, BF16, FP16 = EVERY["float32"], EVERY["bfloat16"], EVERY["float16"]

Cast = Callable[[np.ndarray, Dtype, Dtype, np.ndarray], np.ndarray]
"""(bytes, their dtype, the one wanted, room for it) -> bytes: the room, or where there is nothing to do the first."""

LARGE = 12 * 10**9
"""Bytes from which torch's cast, which is four times as fast as numpy's, saves what importing it costs (2 s on 2 CPUs)."""


@contextmanager
def caster(pairs: Iterable[tuple[Dtype, Dtype]], nbytes: int) -> Iterator[Cast]:
    """What casts `nbytes` of these (stored, wanted) dtypes best; torch's is kept to the thread that calls it."""
    wanted = {(stored, made) for stored, made in pairs if stored is not made}
    if not wanted or (wanted == {(FP32, BF16)} and nbytes < LARGE and "torch" not in sys.modules):
        yield by_numpy
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the parallelism
    try:
        yield by_torch
    finally:
        torch.set_num_threads(threads)


def tensor(block: np.ndarray, dtype: Dtype) -> Any:
    """The same bytes as torch's, one-dimensional."""
    import torch

    return torch.from_numpy(block).view(dtype.torch)


def memory(value: Any) -> np.ndarray:
    """The bytes of one of torch's tensors, contiguous and one-dimensional."""
    import torch

    return value.view(torch.uint8).numpy()


def by_torch(block: np.ndarray, stored: Dtype, wanted: Dtype, room: np.ndarray) -> np.ndarray:
    if stored is wanted:
        return block
    tensor(room, wanted).copy_(tensor(block, stored))
    return room


STEP = 2**18
"""Elements that numpy rounds at a time: few enough for the processor's cache, and enough for threads not to wait for another."""


def by_numpy(block: np.ndarray, stored: Dtype, wanted: Dtype, room: np.ndarray) -> np.ndarray:
    """fp32 to bf16, to the nearest and of two to the even one, bit for bit as torch does; a NaN becomes that of its vector code."""
    if stored is wanted:
        return block
    numbers, bits, made = block.view(np.float32), block.view(np.uint32), room.view(np.uint16)
    space = np.empty(min(STEP, bits.size), np.uint32)
    for start in range(0, bits.size, STEP):
        part = bits[start : start + STEP]
        sums = space[: part.size]
        np.right_shift(part, 16, out=sums)
        np.bitwise_and(sums, 1, out=sums)
        np.add(sums, 0x7FFF, out=sums)
        np.add(sums, part, out=sums)
        np.right_shift(sums, 16, out=made[start : start + STEP], casting="unsafe")
    if bits.size and np.isnan(numbers.max()):
        made[np.isnan(numbers)] = 0xFFFF
    return room
