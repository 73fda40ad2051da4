"""Asks the NVIDIA driver about the GPUs of this node. Needs no torch, and starts no CUDA context."""

import ctypes
from itertools import permutations

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""The driver's numbers of the attributes that make up the compute capability."""


def all_peers(library: str = LIBRARY) -> bool:
    """Whether every visible GPU can access every other; also True if there is no driver to ask, or it does not answer."""
    cuda, count = _open(library)
    return cuda is None or all(_can_access(cuda, *pair) for pair in permutations(range(count), 2))


def lowest_capability(library: str = LIBRARY) -> tuple[int, int] | None:
    """CUDA compute capability of the oldest visible GPU; None if there is no driver to ask, or it does not answer."""
    cuda, count = _open(library)
    if cuda is None:
        return None
    found = [(_attribute(cuda, MAJOR, device), _attribute(cuda, MINOR, device)) for device in range(count)]
    return min(((major, minor) for major, minor in found if major), default=None)


def _open(library: str) -> tuple[ctypes.CDLL | None, int]:
    """The driver and the number of visible GPUs; None without a driver that answers."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None, 0
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None, 0
    return cuda, count.value


def _attribute(cuda: ctypes.CDLL, number: int, device: int) -> int:
    value = ctypes.c_int()
    failed = cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return 0 if failed else value.value


def _can_access(cuda: ctypes.CDLL, device: int, other: int) -> bool:
    answer = ctypes.c_int(1)
    failed = cuda.cuDeviceCanAccessPeer(ctypes.byref(answer), device, other)
    return bool(failed or answer.value)
