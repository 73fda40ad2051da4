"""launcher/verdict.py: the status that fits an exception, by its type and message."""

import pytest

from launcher.verdict import classify

OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
DistBackendError = type("DistBackendError", (RuntimeError,), {})
"""Named as torch's are: no torch is imported to judge them."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: Out of memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "bad_node"),
        (RuntimeError("NVRM: Xid 79, GPU has fallen off the bus"), "bad_node"),
        (DistBackendError("the store went away"), "nccl"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"), "nccl"),
        (RuntimeError("Watchdog caught collective operation timeout in ProcessGroupNCCL"), "nccl"),
        (DistBackendError("NCCL error: CUDA out of memory"), "out_of_memory"),
        (DistBackendError("NCCL error: uncorrectable ECC error encountered"), "bad_node"),
        (RuntimeError("Connection closed by peer [10.0.0.1]:2044"), "failed"),
        (ValueError("loss is nan at step 7"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
    ids=lambda value: str(value)[:40] or type(value).__name__,
)
def test_the_status_fits_the_exception(error: BaseException, status: str) -> None:
    assert classify(error) == status
