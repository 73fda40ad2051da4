"""Tests every rank of an allocation before the long jobs run: device, memory, disks, matrix products and all-reduce."""

import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median_high
from typing import TypedDict

import torch
import torch.distributed as dist

from conf.errors import Problem, SiteError
from conf.files import write_json
from conf.node_paths import expanded
from conf.schema import Config
from jobs.distributed import precision
from jobs.distributed.collectives import raise_on_all_ranks
from jobs.distributed.process_group import World, process_group

log = logging.getLogger(__name__)

MIN_FREE_GIB = 1
"""A disk with less free space has no room for even a log and a small checkpoint."""
PAYLOAD_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Size of the tensor that is all-reduced, by device type."""


class RankReport(TypedDict):
    """What one rank measured: an entry of RUN/preflight.json."""

    rank: int
    host: str
    device: str
    torch: str
    interface: str
    run_free_gib: float
    scratch_free_gib: float
    matmul_tflops: float
    bus_gb_s: float
    sum_is_right: bool


def run(config: Config) -> None:
    """Write RUN/preflight.json, one entry per rank. Raises SiteError that names every unfit rank.

    Raises UserError for what would stop training later, when preprocessing was in vain: a disk that cannot hold the checkpoints,
    or packed rows of which the model cannot keep the samples apart.
    """
    with process_group(config) as world:
        precision.settle(config, world)
        reports: list[RankReport] = [None] * world.size  # type: ignore[list-item]  # filled by the next line
        dist.all_gather_object(reports, measure(config, world))
        if world.is_main:
            write_json(Path(config.run_dir) / "preflight.json", reports)
            for line in table(reports):
                log.info(line)
        if problems := list(find_problems(reports)):
            raise SiteError(*problems)
        if "train" in config.jobs or config.data.packing:
            _check_model(config, world)


def _check_model(config: Config, world: World) -> None:
    from jobs.checkpoint import disk_space  # these import transformers, which takes seconds
    from jobs.model import trained_weights
    from jobs.model.build import build_on_meta
    from jobs.training.loss import separate_samples

    @cache  # rank 0 needs it twice
    def as_trained() -> torch.nn.Module:
        model: torch.nn.Module = build_on_meta(config)
        trained_weights.freeze_others(model, config.train.unfrozen)
        return model

    if "train" in config.jobs:
        disk_space.check(config, as_trained, world, config.train.steps)
    if config.data.packing:
        separate_samples(raise_on_all_ranks(as_trained), world)


def measure(config: Config, world: World) -> RankReport:
    """Measure this rank: matrix products (in 16 bits on GPUs, fp32 on CPUs), all-reduce and free disk space. All ranks call this.

    `bus_gb_s` is the bus bandwidth of all-reduce as nccl-tests defines it.
    """
    half = torch.bfloat16 if precision.this_device(world).has("bf16") else torch.float16
    size, dtype = (8192, half) if world.device.type == "cuda" else (256, torch.float32)
    values = torch.randn(size, size, device=world.device, dtype=dtype)
    matmul_s = _median_seconds(lambda: values @ values, world)
    payload = torch.full((PAYLOAD_BYTES[world.device.type] // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(payload)
    sum_is_right = payload[0].item() == world.size * (world.size + 1) / 2
    all_reduce_s = _median_seconds(lambda: dist.all_reduce(payload), world)
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "interface": world.interface,
        "run_free_gib": _free_gib(config.run_dir),
        "scratch_free_gib": _free_gib(expanded(config.cluster.scratch, "cluster.scratch")),
        "matmul_tflops": 2 * size**3 / matmul_s / 1e12,
        "bus_gb_s": 2 * (world.size - 1) / world.size * payload.nbytes / all_reduce_s / 1e9,
        "sum_is_right": sum_is_right,
    }


def table(reports: list[RankReport]) -> Iterator[str]:
    """The reports as lines of a table with a header."""
    yield "rank  host          device            if     matmul TFLOP/s  all-reduce GB/s  run GiB free  scratch GiB free"
    for report in reports:
        yield (
            f"{report['rank']:>4}  {report['host']:<12}  {report['device']:<16}  {report['interface']:<5}  "
            f"{report['matmul_tflops']:>14.2f}  {report['bus_gb_s']:>15.2f}  {report['run_free_gib']:>12.0f}  "
            f"{report['scratch_free_gib']:>16.0f}"
        )


def find_problems(reports: list[RankReport]) -> Iterator[Problem]:
    """What makes ranks unfit: a wrong sum, a full disk, another torch version, or a GPU slower than half the median."""
    median_tflops = median_high(report["matmul_tflops"] for report in reports)
    for report in reports:
        where = f"rank {report['rank']} on {report['host']}"
        exclude = f"exclude this node with cluster.train.exclude={report['host']}"
        if not report["sum_is_right"]:
            yield Problem(where, None, f"all-reduce returned a wrong sum: {exclude}")
        for disk, setting, free_gib in (
            ("run folder", "run_dir", report["run_free_gib"]),
            ("scratch", "cluster.scratch", report["scratch_free_gib"]),
        ):
            if free_gib < MIN_FREE_GIB:
                problem = f"the disk of the {disk} has only {free_gib:.1f} GiB free: delete files, or change {setting}"
                yield Problem(where, None, problem)
        if report["torch"] != reports[0]["torch"]:
            versions = f"torch {report['torch']} here, torch {reports[0]['torch']} on rank 0"
            yield Problem(where, None, f"{versions}: all nodes need the same version, see cluster.python")
        if report["device"] != "cpu" and report["matmul_tflops"] < median_tflops / 2:
            speeds = f"{report['matmul_tflops']:.0f} TFLOP/s, less than half of the median {median_tflops:.0f}"
            yield Problem(where, None, f"matrix products run at {speeds}: {exclude}")


def _median_seconds(work: Callable[[], object], world: World, repeats: int = 5) -> float:
    """Median seconds of a call. One call before is not counted: it loads kernels and opens connections."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronize(world)
        began = time.perf_counter()
        work()
        _synchronize(world)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[repeats // 2]


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _free_gib(path: str) -> float:
    """Free space on the disk of a path. The path itself may not exist yet: then its closest parent is used."""
    existing = next(item for item in (Path(path), *Path(path).parents) if item.exists())
    return shutil.disk_usage(existing).free / 2**30
