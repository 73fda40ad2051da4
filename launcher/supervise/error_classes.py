"""Tells kinds of failure apart by an exception's type and message, and says what helps; pure, and without torch."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import errno
from collections.abc import Iterator

from launcher.run_folder.status import BAD_NODE, FAILED, NCCL, OUT_OF_MEMORY, USER_ERROR

HOST_MEMORY = "ask for more host memory (memory_gib in the job's section of cluster), or start fewer ranks a node"

RULES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        USER_ERROR,
        (),
        ("/dev/shm/nccl", "shared memory segment", "out of shared memory"),
        "/dev/shm is full or too small: enlarge it for the container or node, or set NCCL_SHM_DISABLE=1 in cluster.environment",
    ),
    (
        OUT_OF_MEMORY,
        ("OutOfMemoryError",),
        ("CUDA out of memory", "CUDA error: out of memory", "HIP out of memory"),
        "a smaller train.micro_batch, train.activation_checkpointing=full, more ranks, or parallel=zero3_offload",
    ),
    (OUT_OF_MEMORY, ("MemoryError",), ("out of memory", "cannot allocate memory"), HOST_MEMORY),
    (
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
        "leave the node out (cluster.train.exclude=NODE) and tell the site's administrators",
    ),
    (
        FAILED,
        (),
        ("device-side assert",),
        "an index is out of range, most often a token id beyond the embedding: compare tokenizer and model; "
        "CUDA_LAUNCH_BLOCKING=1 in cluster.environment names the line",
    ),
    (
        USER_ERROR,
        (),
        ("no space left on device", "disk quota exceeded"),
        "the disk or your quota is full: free space, lower train.keep_checkpoints, or raise train.save_every; then resume",
    ),
    (
        NCCL,
        ("DistBackendError", "DistNetworkError", "DistStoreError"),
        ("nccl",),
        "look at the other ranks with python -m launcher logs, then try pipeline=preflight on these nodes",
    ),
    (
        USER_ERROR,
        ("RepositoryNotFoundError", "EntryNotFoundError", "HFValidationError", "OfflineModeIsEnabled"),
        (),
        "name a folder that every node sees, or what the Hub has: gated models need HF_TOKEN in cluster.secrets, and nodes "
        "without network what was downloaded before (cluster.hf_home)",
    ),
    (
        USER_ERROR,
        ("FileNotFoundError", "NotADirectoryError", "IsADirectoryError", "PermissionError"),
        (),
        "every node must see this path, and you must have the right to use it: check it there, and cluster.container_mounts",
    ),
    (
        USER_ERROR,
        ("ModuleNotFoundError", "ImportError"),
        (),
        "install it for cluster.python, which the ranks run, or inside the container image",
    ),
    (
        FAILED,
        ("FloatingPointError",),
        (),
        "a smaller train.learning_rate, a longer train.warmup_steps, or cleaner data",
    ),
)
"""(status, types by name, words in the message, remedy): the first that fits wins. No torch is imported to name its types."""

ERRORS = {errno.ENOSPC: "no space left on device", errno.EDQUOT: "disk quota exceeded", errno.ENOMEM: "out of memory"}


def classify(error: BaseException) -> tuple[str, str]:
    """The status of attempt-N.json that fits an exception of a rank, and what helps; of what caused it where that says more."""
    for item in _chain(error):
        names = {kind.__name__ for kind in type(item).__mro__}
        text = f"{item} {ERRORS.get(getattr(item, 'errno', None) or 0, '')}".lower()
        for status, types, words, remedy in RULES:
            if names.intersection(types) or any(word.lower() in text for word in words):
                return status, remedy
    return FAILED, ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, then what it was raised from; not what was merely handled when it came."""
    found: BaseException | None = error
    for _ in range(10):
        if found is None:
            return
        yield found
        found = found.__cause__
