"""Tells kinds of failure apart by an exception's type and message; pure, and without torch."""

NCCL = ("DistBackendError", "NCCL", "ProcessGroupNCCL")
HARDWARE = ("uncorrectable ECC", "Xid", "unspecified launch failure", "fallen off the bus")
"""What only a broken GPU says; a device-side assert or an illegal access is a program's."""


def classify(error: BaseException) -> str:
    """The status of DESIGN's attempt-N.json that fits an exception raised on a rank."""
    name, text = type(error).__name__, str(error)
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "out_of_memory"
    if any(word in text for word in HARDWARE):
        return "bad_node"
    if name in NCCL or any(word in text for word in NCCL):
        return "nccl"
    return "failed"
