"""Prints what the jobs of a run had and used, as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.status.efficiency import Efficiency
from launcher.status.tables import duration, print_rows


def show(by_run: Mapping[Path, Sequence[Efficiency]]) -> None:
    """Print one row per job with what it had and used. A column that no job has is left out."""
    found = [job for jobs in by_run.values() for job in jobs]
    rows = [_efficiency_row(job) for job in found]
    if len(by_run) > 1:
        names = [run.name for run, jobs in by_run.items() for _ in jobs]
        rows = [{"run": name} | row for name, row in zip(names, rows, strict=True)]
    total_s, hours = sum(job.ran_s for job in found), sum(job.gpu_hours for job in found)
    lost_s, waits = sum(job.lost_s for job in found), [job.waited_s for job in found if job.waited_s is not None]
    first = "run" if len(by_run) > 1 else "job"
    rows.append(
        {
            first: "all",
            "ran": duration(total_s),
            "waited": duration(sum(waits) if waits else None),
            "lost": duration(lost_s),
            "GPU-hours": f"{hours:.1f}" if hours else "",
        }
    )
    if not found:
        print("no job has begun")
        return
    headings = [heading for heading in rows[0] if any(row.get(heading) for row in rows)]
    print_rows(headings, [[row.get(heading, "") for heading in headings] for row in rows])


def _efficiency_row(job: Efficiency) -> dict[str, str]:
    return {
        "job": job.job,
        "attempts": str(job.attempts),
        "ran": duration(job.ran_s),
        "waited": duration(job.waited_s),
        "lost": duration(job.lost_s),
        "GPUs": str(job.gpus or ""),
        "GPU-hours": f"{job.gpu_hours:.1f}" if job.gpus else "",
        "GPU used": _share(job.gpu_share),
        "in steps": _share(job.in_steps),
        "MFU": _share(job.mfu),
        "GPU GiB": _of(job.gpu_memory_gib, job.gpu_memory_asked_gib),
        "CPUs": str(job.cpus),
        "CPU used": _share(job.cpu_share),
        "memory GiB": _of(job.memory_gib, job.memory_asked_gib),
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _of(used: float | None, asked: float | None) -> str:
    """Return `used of asked`; empty if what was used is unknown."""
    if used is None:
        return ""
    return f"{used:.1f}" if asked is None else f"{used:.1f} of {asked:.0f}"
