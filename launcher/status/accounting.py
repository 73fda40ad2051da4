"""Reads from Slurm's accounting how much of its CPUs, memory and GPUs each job has used."""

import re
from collections.abc import Collection, Iterable, Sequence
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


@dataclass(frozen=True)
class Record:
    """One start of a job in the database: a restart has a record of its own."""

    job_id: str
    whole: dict[str, str]
    steps: list[dict[str, str]]


def records(job_ids: Iterable[str], folders: Collection[str]) -> list[Record]:
    """Return what accounting knows of these jobs, which start in one of `folders`. Raises SlurmError without accounting.

    Slurm gives ids again after some time. Records of jobs that started elsewhere are left out.
    """
    found: list[Record] = []
    for line in slurm.accounted(job_ids):
        job_id, _, step = line["JobID"].partition(".")
        if not step:
            found.append(Record(job_id, line, []))
        elif found and found[-1].job_id == job_id:  # sacct prints the steps of a job below it
            found[-1].steps.append(line)
    return [record for record in found if record.whole["WorkDir"] in ("", *folders)]


def used(found: Sequence[Record]) -> Used:
    """Return what one job had and used, from all its records, also those of earlier submissions."""
    had_s = sum(int(record.whole["AllocCPUS"] or 0) * int(record.whole["ElapsedRaw"] or 0) for record in found)
    cpu_s = sum(map(_cpu_seconds, found))
    lines = [line for record in found for line in (record.whole, *record.steps)]
    asked = [mib for record in found if (mib := _resource(record.whole["AllocTRES"], "mem"))]
    peaks = [mib for line in lines if (mib := _resource(line["TRESUsageInTot"], "mem"))]
    # each step has its own mean: weigh it with the step's time
    gpus = [(share, int(line["ElapsedRaw"] or 0)) for line in lines if (share := _utilization(line)) is not None]
    gpu_s = sum(elapsed for _, elapsed in gpus)
    return Used(
        cpus=max((int(record.whole["AllocCPUS"] or 0) for record in found), default=None),
        cpu_share=cpu_s / had_s if had_s else None,
        memory_gib=max(peaks) / 1024 if peaks else None,
        memory_asked_gib=max(asked) / 1024 if asked else None,
        gpu_share=sum(share * elapsed for share, elapsed in gpus) / gpu_s if gpu_s else None,
    )


def _cpu_seconds(record: Record) -> float:
    """Return the CPU time of a record. Of a killed step, TotalCPU lacks the child processes; the samples have them."""
    of_steps = sum(max(seconds(line["TotalCPU"]), _sampled_cpu(line)) for line in record.steps)
    return max(seconds(record.whole["TotalCPU"]), of_steps)


def _sampled_cpu(line: dict[str, str]) -> float:
    match = re.search(r"(?:^|,)cpu=([\d:.-]+)", line["TRESUsageInTot"])
    return seconds(match[1]) if match else 0.0


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
