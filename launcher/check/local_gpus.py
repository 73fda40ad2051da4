"""Counts the GPUs of this machine, NVIDIA's and AMD's, with name and memory, from the kernel's files; torch is not imported."""

import math
import os
import subprocess
from importlib import metadata
from pathlib import Path

from conf.plural import plural

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
            items = [item.strip() for item in value.split(",") if item.strip()]
            count = min(count, items.index("-1") if "-1" in items else len(items))  # as CUDA reads it
    return count


def usable(root: Path = Path("/")) -> int:
    """The same, but 0 if the torch of this interpreter can only use the CPU."""
    return 0 if _is_for_cpus(_torch_version()) else local_gpus(root)


def described(used: int, root: Path = Path("/")) -> str:
    """What `used` GPUs are, or why the CPU is used: `on 1 GPU (NVIDIA L4)`, `on the CPU: no GPU was found`."""
    if used:
        return f"on {plural(used, 'GPU')} ({', '.join(dict.fromkeys(_names(root))) or 'of an unknown type'})"
    hidden_by = [name for name in AMD_VARIABLES if os.environ.get(name) is not None]
    if _nvidia(root) + len(_amd(root)) == 0:
        why = "no GPU was found"
        if any((root / "dev").glob("nvidia[0-9]*")):
            why = "the kernel's driver of the NVIDIA GPU is not loaded (no /proc/driver/nvidia/version)"
    elif local_gpus(root) == 0:
        why = f"{hidden_by[0]}={os.environ[hidden_by[0]]} hides the GPUs"
    elif _is_for_cpus(version := _torch_version()):
        why = f"torch {version} is built without GPUs. Install another torch to use {plural(local_gpus(root), 'GPU')}"
    else:
        why = f"{plural(local_gpus(root), 'GPU')} not used, because gpus_per_node=0"
    return f"on the CPU: {why}"


def _torch_version() -> str:
    """The version of torch that this interpreter would import; empty if it has none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _is_for_cpus(torch_version: str) -> bool:
    return torch_version.endswith("+cpu")


def _names(root: Path) -> list[str]:
    """The names of the GPUs, as their driver tells them."""
    names = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    for folder in _amd(root):
        version = _property(folder / "properties", "gfx_target_version")  # 90402: gfx942
        names.append(f"AMD gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
    return names


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
        words = dict(line.split(maxsplit=1) for line in path.read_text(encoding="ascii").splitlines() if " " in line)
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
        output = subprocess.run(command, capture_output=True, encoding="ascii", timeout=30, check=True).stdout
        return min(math.floor(0.995 * int(line) / 1024) for line in output.split())  # lines are MiB
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _amd_bytes(node: Path) -> int:
    """Bytes of a GPU's memory, in one bank or several."""
    return sum(_property(path, "size_in_bytes") for path in node.glob("mem_banks/*/properties"))
