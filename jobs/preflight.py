"""Looks at every rank of an allocation before hours are spent on it: device, memory, disk, arithmetic and all-reduce."""

import logging
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import Problem, SiteError
from conf.files import write_json
from conf.schema import Config
from jobs.distributed.process_group import World, process_group

log = logging.getLogger(__name__)

FREE_GIB = 1
"""Disk that is too full to hold even a log and a small checkpoint."""
PAYLOAD_BYTES = {"cpu": 2**20, "cuda": 2**28}


def run(config: Config) -> None:
    """Write RUN/preflight.json, one entry a rank. Raises SiteError naming every rank that is not fit."""
    with process_group(config) as world:
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, look(config, world))
        if world.is_main:
            write_json(Path(config.run_dir) / "preflight.json", found)
            for line in table(found):
                log.info(line)
        if problems := list(judge(found)):
            raise SiteError(*problems)


def look(config: Config, world: World) -> dict[str, Any]:
    """What this rank has: host, device, versions, free GiB of the run's disk and of scratch, and two short measurements."""
    size, dtype = (8192, torch.bfloat16) if world.device.type == "cuda" else (256, torch.float32)
    values = torch.randn(size, size, device=world.device, dtype=dtype)
    seconds = _timed(lambda: values @ values, world)
    payload = torch.full((PAYLOAD_BYTES[world.device.type] // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(payload)
    right = payload[0].item() == world.size * (world.size + 1) / 2
    reduce_s = _timed(lambda: dist.all_reduce(payload), world)
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "interface": world.interface,
        "run_free_gib": _free_gib(config.run_dir),
        "scratch_free_gib": _free_gib(config.cluster.scratch),
        "matmul_tflops": 2 * size**3 / seconds / 1e12,
        "bus_gb_s": 2 * (world.size - 1) / world.size * payload.nbytes / reduce_s / 1e9,
        "sum_is_right": right,
    }


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "rank  host          device            if     matmul TFLOP/s  all-reduce GB/s  run GiB free  scratch GiB free"
    for item in found:
        yield (
            f"{item['rank']:>4}  {item['host']:<12}  {item['device']:<16}  {item['interface']:<5}  {item['matmul_tflops']:>14.2f}  "
            f"{item['bus_gb_s']:>15.2f}  {item['run_free_gib']:>12.0f}  {item['scratch_free_gib']:>16.0f}"
        )


def judge(found: list[dict[str, Any]]) -> Iterator[Problem]:
    """What makes an allocation unfit: a wrong sum, a full disk, other versions, or a device at under half the others' speed."""
    median = sorted(item["matmul_tflops"] for item in found)[len(found) // 2]
    for item in found:
        where = f"rank {item['rank']} on {item['host']}"
        if not item["sum_is_right"]:
            yield Problem(
                where,
                None,
                f"an all-reduce gave a wrong sum; leave the node out with cluster.train.exclude={item['host']}",
            )
        for name in ("run", "scratch"):
            if item[f"{name}_free_gib"] < FREE_GIB:
                yield Problem(where, None, f"the disk of {name} has {item[f'{name}_free_gib']:.1f} GiB free")
        if item["torch"] != found[0]["torch"]:
            yield Problem(where, None, f"has torch {item['torch']}, rank 0 has {found[0]['torch']}: see cluster.python")
        if item["device"] != "cpu" and item["matmul_tflops"] < median / 2:
            yield Problem(where, None, f"multiplies at {item['matmul_tflops']:.0f} TFLOP/s, the others at {median:.0f}: "
                          f"leave it out with cluster.train.exclude={item['host']}")  # fmt: skip


def _timed(work: Any, world: World, repeats: int = 5) -> float:
    """Median seconds of one call, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronise(world)
        began = time.perf_counter()
        work()
        _synchronise(world)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[repeats // 2]


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _free_gib(path: str) -> float:
    existing = next(item for item in (Path(path), *Path(path).parents) if item.exists())
    return shutil.disk_usage(existing).free / 2**30
