"""Reads from Slurm's accounting how much of its CPUs, memory and GPUs each job has used."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from launcher import slurm

MIB = {"": 1 / 2**20, "K": 1 / 2**10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}
"""MiB in each unit of Slurm's sizes."""


@dataclass(frozen=True)
class Used:
    """What one job had and used, over all its restarts. None: accounting does not say."""

    cpus: int | None = None
    cpu_share: float | None = None
    """CPU time over CPUs x elapsed time."""
    memory_gib: float | None = None
    """Peak over all tasks of a step."""
    memory_asked_gib: float | None = None
    gpu_share: float | None = None
    """Mean utilization of the GPUs, where Slurm gathers it (JobAcctGather with NVML)."""


def read(job_ids: Iterable[str]) -> dict[str, Used]:
    """Return what accounting knows, by job id; nothing without accounting."""
    try:
        lines = slurm.accounted(job_ids)
    except slurm.SlurmError:
        return {}
    by_job: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in lines:
        by_job[line["JobID"].partition(".")[0]].append(line)
    return {job_id: _used(found) for job_id, found in by_job.items()}


def _used(lines: list[dict[str, str]]) -> Used:
    whole = [line for line in lines if "." not in line["JobID"]]
    had_s = sum(int(line["AllocCPUS"] or 0) * int(line["ElapsedRaw"] or 0) for line in whole)
    cpu_s = sum(seconds(line["TotalCPU"]) for line in whole)
    asked = [mib for line in whole if (mib := _resource(line["AllocTRES"], "mem"))]
    peaks = [mib for line in lines if (mib := _resource(line["TRESUsageInTot"], "mem"))]
    # each step has its own mean: weigh it with the step's time
    gpus = [(share, int(line["ElapsedRaw"] or 0)) for line in lines if (share := _utilization(line)) is not None]
    gpu_s = sum(elapsed for _, elapsed in gpus)
    return Used(
        cpus=max((int(line["AllocCPUS"] or 0) for line in whole), default=None),
        cpu_share=cpu_s / had_s if had_s else None,
        memory_gib=max(peaks) / 1024 if peaks else None,
        memory_asked_gib=max(asked) / 1024 if asked else None,
        gpu_share=sum(share * elapsed for share, elapsed in gpus) / gpu_s if gpu_s else None,
    )


def seconds(text: str) -> float:
    """Return a time as sacct writes it, [days-][hours:]minutes:seconds[.thousandths], in seconds; 0 for anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text.strip())
    if not match:
        return 0.0
    days, hours, minutes, rest = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _resource(text: str, name: str) -> float | None:
    """Return a size in a list of resources (`cpu=4,mem=1024M`) in MiB."""
    match = re.search(rf"(?:^|,){name}=([\d.]+)([KMGT]?)", text)
    return float(match[1]) * MIB[match[2]] if match else None


def _utilization(line: dict[str, str]) -> float | None:
    match = re.search(r"(?:^|,)gres/gpuutil=(\d+)", line["TRESUsageInAve"])
    return int(match[1]) / 100 if match else None
