"""Tells kinds of failure apart by an exception's type and message; pure, and without torch."""

NCCL = ("DistBackendError", "NCCL", "ProcessGroupNCCL")
DEVICE = ("uncorrectable ECC", "device-side assert", "Xid", "CUDA error: an illegal", "unspecified launch failure")


def classify(error: BaseException) -> str:
    """The status of DESIGN's attempt-N.json that fits an exception raised on a rank."""
    name, text = type(error).__name__, str(error)
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "out_of_memory"
    if "uncorrectable ECC" in text or "Xid" in text:
        return "bad_node"
    if name in NCCL or any(word in text for word in NCCL):
        return "nccl"
    return "failed"
