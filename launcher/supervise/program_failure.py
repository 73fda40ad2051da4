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

ALONE = "train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size"
"""What DeepSpeed says on nodes without GPUs if Accelerate takes each rank for the only one."""
BACKEND = (
    "on nodes without GPUs, Accelerate counts the ranks only if the program names the backend: "
    'TrainingArguments(ddp_backend="gloo") or InitProcessGroupKwargs(backend="gloo"); on GPUs, compare the batch sizes in the '
    "program's own DeepSpeed config"
)


def status_and_remedy(exception: str, text: str) -> tuple[str, str]:
    """Return both for the last exception that the program printed: the name of its class (or empty) and its text."""
    if ALONE in text:
        return USER_ERROR, BACKEND
    status, remedy = classify(type(exception or "Failure", (Exception,), {})(text))
    names_our_keys = "train." in remedy.replace("cluster.train.", "")
    return status, REMEDIES.get(status, "") if names_our_keys else remedy
