"""Says what this Python can do for training: torch, GPUs, packages, and one real operation of each. `muster doctor` starts it.

    python jobs/probe.py

The last line that it prints is PROBE and a JSON object. It needs no package at its top, to say so where one is missing.
"""

import importlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PREFIX = "PROBE "
DISTRIBUTIONS = (
    "torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "bitsandbytes", "safetensors", "tiktoken", "numpy",
    "tqdm", "xxhash", "triton", "torchao", "flash-attn", "flash-attn-3", "flash-attn-4", "tensorboard", "wandb", "mlflow-skinny",
    "mlflow", "comet-ml",
)  # fmt: skip
"""Packages whose versions are shown, by their names for pip."""
DEEPSPEED_OPS = ("cpu_adam", "fused_adam", "async_io")


def facts() -> dict[str, Any]:
    """Return everything that is known of this Python, as JSON can hold it."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "packages": _versions(), "gpus": [], "operations": []}
    try:
        found |= _torch()
    except Exception as error:  # a torch that cannot be loaded is what the user wants to know
        found["torch_error"] = _line(error)
        return found
    on_gpu = bool(found["gpus"])
    found["operations"] = [_tried(name, work) for name, work in _operations(on_gpu, found["packages"]).items()]
    return found


def _versions() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cuda": torch.version.cuda, "hip": torch.version.hip, "nccl": None, "gpus": []}
    with suppress(Exception):  # a build without NCCL
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        torch.cuda.init()
    except Exception as error:
        found["cuda_error"] = _line(error)
        return found
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found["gpus"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
            }
        )
    return found


def _operations(on_gpu: bool, packages: dict[str, str]) -> dict[str, Callable[[], str]]:
    """Return what is tried, by name. Each returns one line, or raises."""
    work: dict[str, Callable[[], str]] = {
        "attention": lambda: _attention(on_gpu),
        "all-reduce (gloo)": lambda: _all_reduce("gloo"),
        "compiler": _compiler,
    }
    if on_gpu:
        work["all-reduce (nccl)"] = lambda: _all_reduce("nccl")
    for name in ("transformers", "datasets", "peft", "accelerate"):
        if name in packages:
            work[name] = lambda name=name: _imported(name)  # type: ignore[misc]
    if "deepspeed" in packages:
        work["deepspeed"] = _deepspeed
    if "bitsandbytes" in packages:
        work["bitsandbytes"] = lambda: _bitsandbytes(on_gpu)
    if "flash-attn" in packages:
        work["flash-attn"] = lambda: _flash_attention(on_gpu)
    return work


def _tried(name: str, work: Callable[[], str]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        detail, works = work(), True
    except BaseException as error:  # some libraries end the process when they cannot be loaded
        detail, works = _line(error), False
    return {"name": name, "works": works, "detail": detail, "seconds": round(time.monotonic() - began, 1)}


def _attention(on_gpu: bool) -> str:
    import torch

    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    query = torch.randn(1, 4, 64, 32, device=device, dtype=dtype)
    actual = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    scores = (query.float() @ query.float().mT / 32**0.5).masked_fill(
        torch.ones(64, 64, device=device).triu(1).bool(), float("-inf")
    )
    difference = (actual.float() - scores.softmax(-1) @ query.float()).abs().max().item()
    if difference > 0.05:
        raise RuntimeError(f"differs from the formula by {difference:.3g}")
    return f"right on {device} in {str(dtype).removeprefix('torch.')}"


def _all_reduce(backend: str) -> str:
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            value = torch.ones(8, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(value)
            if value.sum().item() != 8:
                raise RuntimeError("the sum is wrong")
        finally:
            dist.destroy_process_group()
    return "right on one rank"


def _compiler() -> str:
    path = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")  # noqa: TID251
    if path is None:
        raise FileNotFoundError("no C++ compiler on PATH")
    return path


def _imported(name: str) -> str:
    importlib.import_module(name)
    return "can be imported"


def _deepspeed() -> str:
    importlib.import_module("deepspeed")
    ops = importlib.import_module("deepspeed.ops.op_builder.all_ops").ALL_OPS
    states = [
        f"{name} {'yes' if ops[name].is_compatible(verbose=False) else 'no'}" for name in DEEPSPEED_OPS if name in ops
    ]
    return "operations that can be built: " + ", ".join(states)


def _bitsandbytes(on_gpu: bool) -> str:
    import torch

    functional = importlib.import_module("bitsandbytes.functional")
    weight = torch.randn(64, 64, device="cuda" if on_gpu else "cpu", dtype=torch.float32)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weight).abs().mean().item()
    if error > 0.2:
        raise RuntimeError(f"nf4 is off by {error:.2f} on average")
    return f"nf4 there and back on {weight.device.type}"


def _flash_attention(on_gpu: bool) -> str:
    import torch

    module = importlib.import_module("flash_attn")
    if not on_gpu:
        return "can be imported; it needs a GPU"
    query = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16)
    if not torch.isfinite(module.flash_attn_func(query, query, query, causal=True)).all():
        raise RuntimeError("its result is not finite")
    return "right on cuda"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(": ")


if __name__ == "__main__":
    result = facts()
    print(f"\n{PREFIX}{json.dumps(result)}", flush=True)
    os._exit(0)  # some libraries hang or abort while they unload
