"""Asks the NVIDIA driver whether the GPUs of this node can read each other's memory. Needs no torch, and starts no CUDA context."""

import ctypes
from itertools import permutations


def all_peers(library: str = "libcuda.so.1") -> bool:
    """Whether every visible GPU can access every other; also True if there is no driver to ask, or it does not answer."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return True
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return True
    return all(_can_access(cuda, *pair) for pair in permutations(range(count.value), 2))


def _can_access(cuda: ctypes.CDLL, device: int, other: int) -> bool:
    answer = ctypes.c_int(1)
    failed = cuda.cuDeviceCanAccessPeer(ctypes.byref(answer), device, other)
    return bool(failed or answer.value)
