"""Asks the Python of the jobs what it can do, in another process: torch, GPUs, packages and their operations."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conf import packages
from launcher.doctor.check import Check, error, warning
from launcher.paths import CLONE

TOPIC = "training"
TIMEOUT_S = 300
"""Importing everything takes minutes on a busy file system."""
PREFIX = "PROBE "
"""Before the answer of jobs/probe.py."""
NEEDED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "tiktoken", "numpy", "tqdm", "xxhash")
"""No run can work without them."""
FOR = {
    "peft": "adapters (LoRA) need it: pip install peft, or train with adapter=none",
    "deepspeed": "parallel=zero1 to zero3 need it: pip install deepspeed, or use parallel=fsdp",
    "bitsandbytes": "QLoRA and 8-bit optimizers need it: pip install bitsandbytes",
}
"""Packages of the extra `train` that some runs can do without, and what needs them."""
OPTIONAL = (*packages.PIP_NAMES.values(), "torchao", "triton")
REMEDIES = {
    "compiler": "DeepSpeed's and torch.compile's kernels are built with it: load a module with a compiler in cluster.setup",
    "all-reduce (nccl)": "set NCCL_DEBUG=INFO and read what it says; see docs/cluster.md",
}


def ask(python: str) -> dict[str, Any] | str:
    """Start jobs/probe.py in that Python. Returns what it found, or in one line why it could not be asked."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # not -m: the packages around it need omegaconf, which may be missing too
    command = [python, "-c", f"import runpy; runpy.run_path({str(CLONE / 'jobs/probe.py')!r}, run_name='__main__')"]
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        return f"{python} is not here"
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S} s"
    except OSError as problem:
        return f"{python}: {problem.strerror}"
    lines = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if not lines:
        said = done.stderr.strip().splitlines()
        return f"ended with {done.returncode}: {said[-1] if said else 'it printed nothing'}"
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(PREFIX))
    return found


def checks(python: str, found: dict[str, Any] | str, gpus_here: int) -> Iterator[Check]:
    """Judge the answer. `gpus_here`: the GPUs that the kernel of this machine shows."""
    if isinstance(found, str):
        remedy = "set cluster.python to the Python that has Muster's training packages, or install them: pip install -e '.[train]'"
        yield error(TOPIC, "Python", found, remedy)
        return
    yield Check(TOPIC, "Python", f"{found['python']} ({python})")
    yield from _packages(found["packages"])
    if "torch_error" in found:
        if "torch" in found["packages"]:
            yield error(TOPIC, "torch", found["torch_error"], "it is installed but cannot be loaded: install it again")
        return
    yield from _device(found, gpus_here)
    for tried in found["operations"]:
        yield _operation(tried)


def _packages(versions: Mapping[str, str]) -> Iterator[Check]:
    for name in NEEDED:
        if name not in versions:
            yield error(TOPIC, name, "not installed", "pip install -e '.[train]'")
    for name, remedy in FOR.items():
        if name not in versions:
            yield warning(TOPIC, name, "not installed", remedy)
    shown = [f"{name} {versions[name]}" for name in (*NEEDED, *FOR, *OPTIONAL) if name in versions]
    yield Check(TOPIC, "packages", ", ".join(shown))
    if not any(name.startswith("flash-attn") for name in versions):
        yield Check(TOPIC, "flash-attn", "not installed; it is never needed")


def _device(found: Mapping[str, Any], gpus_here: int) -> Iterator[Check]:
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "the CPU"
    nccl = f", NCCL {found['nccl']}" if found["nccl"] else ""
    yield Check(TOPIC, "torch", f"built for {build}{nccl}")
    driver = _driver()
    if driver:
        yield Check(TOPIC, "driver", driver)
    if gpus_here and not found["gpus"]:
        why = found.get("cuda_error", "torch sees no GPU")
        remedy = "install a torch for this driver: https://pytorch.org/get-started"
        if found["cuda"] is None and found["hip"] is None:
            remedy = "this torch is built for CPUs: install one for CUDA, https://pytorch.org/get-started"
        yield error(TOPIC, "GPUs", f"{gpus_here} in this machine, but: {why}", remedy)
    elif not found["gpus"]:
        yield Check(TOPIC, "GPUs", "none in this machine; training here uses the CPU")
    for number, gpu in enumerate(found["gpus"]):
        text = (
            f"{gpu['name']}, {gpu['memory_gib']} GiB ({gpu['free_gib']} free), compute capability {gpu['capability']}"
        )
        if gpu["free_gib"] < gpu["memory_gib"] / 2:
            yield warning(TOPIC, f"GPU {number}", text, "another process holds its memory: see nvidia-smi")
        else:
            yield Check(TOPIC, f"GPU {number}", text)


def _operation(tried: Mapping[str, Any]) -> Check:
    name, detail = tried["name"], tried["detail"]
    if tried["works"]:
        return Check(TOPIC, name, f"{detail} ({tried['seconds']} s)")
    if name in NEEDED or name in ("attention", "all-reduce (gloo)", "all-reduce (nccl)"):
        return error(TOPIC, name, detail, REMEDIES.get(name, f"install it again: pip install --force-reinstall {name}"))
    return warning(TOPIC, name, detail, REMEDIES.get(name) or FOR.get(name) or "runs that do not use it work")


def _driver() -> str:
    """Return the version of NVIDIA's kernel driver; empty without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.splitlines()[0].removeprefix("NVRM version: ") if text else ""
