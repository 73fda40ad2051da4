"""Counts the GPUs of this machine and their memory, NVIDIA's and AMD's, from the kernel's files: launcher/ never imports torch."""

import math
import os
import subprocess
from pathlib import Path

NVIDIA_VARIABLES = ("CUDA_VISIBLE_DEVICES",)
AMD_VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""Variables that hide GPUs from a process. Each takes from what the one before it has left."""


def local_gpus(root: Path = Path("/")) -> int:
    """GPUs that a process started here would see. `root` is the folder in which /dev, /proc and /sys are."""
    count = _nvidia(root)
    variables = NVIDIA_VARIABLES if count else AMD_VARIABLES
    count = count or len(_amd(root))
    for name in variables:
        if (value := os.environ.get(name)) is not None:
            count = min(count, len([item for item in value.split(",") if item.strip()]))
    return count


def _nvidia(root: Path) -> int:
    devices = [path for path in (root / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    # device files without the kernel's driver are of no use
    return len(devices) if (root / "proc/driver/nvidia/version").exists() else 0


def _amd(root: Path) -> list[Path]:
    """The kernel's folders of AMD's GPUs. Its list has CPUs too: they have no gfx version."""
    if not (root / "dev/kfd").exists():
        return []
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return [path.parent for path in nodes if _property(path, "gfx_target_version")]


def _property(path: Path, name: str) -> int:
    try:
        words = dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)
        return int(words.get(name, 0))
    except (OSError, ValueError):
        return 0


def local_memory_gib(root: Path = Path("/")) -> float | None:
    """Memory of the smallest GPU here, in whole GiB, less 0.5 % that the driver keeps. None if it cannot be found out."""
    sizes = [_amd_bytes(folder) for folder in _amd(root)] if not _nvidia(root) else []
    if sizes:
        return math.floor(0.995 * min(sizes) / 2**30) if all(sizes) else None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        return min(math.floor(0.995 * int(line) / 1024) for line in output.split())  # lines are MiB
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _amd_bytes(node: Path) -> int:
    """Bytes of a GPU's memory, in one bank or several."""
    return sum(_property(path, "size_in_bytes") for path in node.glob("mem_banks/*/properties"))
