"""Turns the failure of the user's own program (the job `custom`) into the status and the remedy of a verdict. Pure."""

from __future__ import annotations

from launcher.run_folder.status import FAILED, OUT_OF_MEMORY, USER_ERROR
from launcher.supervise.error_classes import classify

REMEDIES = {
    OUT_OF_MEMORY: "give the program a smaller batch or shorter rows, or shard more with parallel=fsdp or parallel=zero3, which "
    "programs of Accelerate and Trainer read from the environment",
    USER_ERROR: "the disk or your quota is full: free space, or let the program keep fewer checkpoints; then resume",
    FAILED: "use a smaller learning rate, a longer warmup, or cleaner data",
}
"""Instead of remedies that name keys of Muster's own training, which the program does not read."""


def status_and_remedy(exception: str, text: str) -> tuple[str, str]:
    """Return both for the last exception that the program printed: the name of its class (or empty) and its text."""
    status, remedy = classify(type(exception or "Failure", (Exception,), {})(text))
    names_our_keys = "train." in remedy.replace("cluster.train.", "")
    return status, REMEDIES.get(status, "") if names_our_keys else remedy
