"""Classifies exceptions by type and message, and names a remedy for each class. Pure, and without torch."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import errno
import re
from collections.abc import Iterator
from typing import NamedTuple

from launcher.run_folder.status import BAD_NODE, FAILED, NCCL, OUT_OF_MEMORY, USER_ERROR

HOST_MEMORY = "ask for more host memory (memory_gib in the job's section of cluster), or start fewer ranks per node"


class ErrorClass(NamedTuple):
    """One kind of failure: how to recognize its exception, and what to do about it."""

    status: str
    """The status of attempt-N.json."""
    types: tuple[str, ...]
    """Names of exception classes. Names, because this module must not import torch."""
    phrases: tuple[str, ...]
    """Parts of the message, in any case."""
    remedy: str


ERROR_CLASSES = (
    ErrorClass(
        USER_ERROR,
        (),
        ("/dev/shm/nccl", "shared memory segment", "out of shared memory"),
        "/dev/shm is full or too small: enlarge it for the container or node, or set NCCL_SHM_DISABLE=1 in cluster.environment",
    ),
    ErrorClass(
        OUT_OF_MEMORY,
        ("OutOfMemoryError",),
        ("CUDA out of memory", "CUDA error: out of memory", "HIP out of memory"),
        "try in this order: train.micro_batch=1, train.activation_checkpointing=full, a shorter data.max_length, adapter=qlora, "
        "more ranks, parallel=zero3_offload; under ZeRO-3 also "
        "parallel.deepspeed.zero_optimization.stage3_max_live_parameters=100000000",
    ),
    ErrorClass(OUT_OF_MEMORY, ("MemoryError",), ("out of memory", "cannot allocate memory"), HOST_MEMORY),
    ErrorClass(
        BAD_NODE,
        (),
        (
            "uncorrectable ecc",
            "nvrm: xid",
            "fallen off the bus",
            "gpu is lost",
            "unspecified launch failure",
            "uncorrectable nvlink",
            "over nvlink or a hardware error",
            "busy or unavailable",
            "no cuda-capable device",
            "system not yet initialized",
            "hardware stack error",
        ),
        "exclude the node (cluster.train.exclude=NODE) and report it to the administrators of the cluster",
    ),
    ErrorClass(
        FAILED,
        (),
        ("device-side assert",),
        "an index is out of range, most often a token id beyond the embedding: check that the tokenizer fits the model; "
        "CUDA_LAUNCH_BLOCKING=1 in cluster.environment shows the line that failed",
    ),
    ErrorClass(
        USER_ERROR,
        (),
        ("no space left on device", "disk quota exceeded"),
        "the disk or your quota is full: free space, lower train.keep_checkpoints, or raise train.save_every; then resume",
    ),
    ErrorClass(
        NCCL,
        (),
        ("clients joined", "client socket has timed out", "keys: /default_pg/", "connectfullmesh failed"),
        "not all ranks have met in time: if some only start slowly (a large image, a busy disk), raise "
        "cluster.network.nccl_timeout_s; else look for one that failed (muster logs RUN --rank R), check the nodes with "
        "pipeline=preflight, and name their network in cluster.network.interface",
    ),
    ErrorClass(
        NCCL,
        ("DistBackendError", "DistNetworkError", "DistStoreError"),
        ("nccl",),
        "read the logs of the other ranks (muster logs RUN --rank R), then check the nodes with pipeline=preflight; if nodes do "
        "not reach each other, name their network in cluster.network.interface; if GPUs of a node do not, set "
        "cluster.environment.NCCL_P2P_DISABLE=1",
    ),
    ErrorClass(
        USER_ERROR,
        ("RepositoryNotFoundError", "EntryNotFoundError", "HFValidationError", "OfflineModeIsEnabled"),
        (),
        "give a folder that every node can read, or a name that exists on the Hub; a gated model needs HF_TOKEN in "
        "cluster.secrets, and nodes without network need a model that was downloaded before (cluster.hf_home)",
    ),
    ErrorClass(
        USER_ERROR,
        ("FileNotFoundError", "NotADirectoryError", "IsADirectoryError", "PermissionError"),
        (),
        "every node must be able to reach this path, with the rights it needs: check the path on the node, and "
        "cluster.container.mounts",
    ),
    ErrorClass(
        USER_ERROR,
        ("ModuleNotFoundError", "ImportError"),
        (),
        "install the package for cluster.python, which runs the ranks, or in the container image",
    ),
    ErrorClass(
        FAILED,
        ("FloatingPointError",),
        (),
        "use a smaller train.learning_rate, a longer train.warmup_steps, or cleaner data",
    ),
)
"""In order of precedence: the first class that fits wins. A full /dev/shm, for example, must come before a full disk."""

EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): |\((\w+Error): |^\S*python[\d.]*: No module named ")
"""How a line names an exception: `json.JSONDecodeError: ...`. `python -m NAME` prints only the other forms."""

ERRNO_TEXTS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.ENOMEM: "out of memory",
}
"""English texts by errno, for machines whose C library answers in another language."""


def classify(error: BaseException) -> tuple[str, str]:
    """Return the status of attempt-N.json for an exception of a rank, and the remedy (empty if none is known).

    Also looks at the exceptions that it was raised from, because they are often more specific.
    """
    for cause in _causes(error):
        type_names = {base.__name__ for base in type(cause).__mro__}
        text = f"{cause} {ERRNO_TEXTS.get(getattr(cause, 'errno', None) or 0, '')}"
        if found := _find_class(type_names, text):
            return found.status, found.remedy
    return FAILED, ""


def classify_line(line: str) -> tuple[str, str] | None:
    """Return status and remedy for the last line of a traceback that Python has printed; None for any other line."""
    match = EXCEPTION.search(line)
    if not match:
        return None
    found = _find_class({match[1] or match[2] or "ModuleNotFoundError"}, line)
    return (found.status, found.remedy) if found else (FAILED, "")


def _find_class(type_names: set[str], text: str) -> ErrorClass | None:
    for item in ERROR_CLASSES:
        if type_names.intersection(item.types) or any(phrase.lower() in text.lower() for phrase in item.phrases):
            return item
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those it was raised from (`raise ... from`), at most ten.

    Not `__context__`: an exception that was only being handled at that time need not be the cause.
    """
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__
