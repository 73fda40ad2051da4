"""What becomes of environment variables that a config or a script sets."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from launcher import secret_names
from launcher.convert.keys import Outcome, Row, described, joined


@described("`cluster.environment`")
def environment(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """Variables that a program sets before it starts."""
    rows = [variable(str(name), item) for name, item in dict(value).items()]
    row = joined(key, value, rows)
    variables = {name: text for part in rows for name, text in part.ours.get("cluster.environment", {}).items()}
    return replace(row, ours={"cluster.environment": variables} if variables else {})


OF_LAUNCHERS = ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK",
                "LOCAL_RANK", "NUM_PROCESSES", "ACCELERATE_*", "FORCE_TORCHRUN", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
                "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "USE_HF", "HF_ENDPOINT",
                "PYTHONPATH")  # fmt: skip
OF_OTHERS = (
    "*_PIXELS",
    "FPS*",
    "IMAGE_*",
    "VIDEO_*",
    "ASCEND_*",
    "HCCL_*",
    "PYTORCH_NPU_*",
    "TASK_QUEUE_ENABLE",
    "VLLM_*",
    "NPU_*",
)


def variable(name: str, value: Any) -> Row:
    """What becomes of an environment variable."""
    if any(fnmatchcase(name, pattern) for pattern in OF_LAUNCHERS):
        return Row(name, value, Outcome.unneeded, why="Muster sets what the ranks need")
    if any(fnmatchcase(name, pattern) for pattern in OF_OTHERS):
        return Row(name, value, Outcome.unneeded, why="is for pictures, or for other hardware")
    if secret_names.holds_secret(name, str(value)):
        return Row(
            name, secret_names.MASK, Outcome.refused, why=f"secrets are named, not written: cluster.secrets=[{name}]"
        )
    return Row(name, value, Outcome.kept, {"cluster.environment": {name: str(value)}})
