"""Prints what the jobs of a run had and used, as a table."""

from collections.abc import Sequence

from launcher.status.efficiency import Efficiency
from launcher.status.tables import duration, print_rows


def show(found: Sequence[Efficiency]) -> None:
    """Print one row per job with what it had and used. A column that no job has is left out."""
    rows = [_efficiency_row(job) for job in found]
    total_s, hours = sum(job.ran_s for job in found), sum(job.gpu_hours for job in found)
    lost_s, waits = sum(job.lost_s for job in found), [job.waited_s for job in found if job.waited_s is not None]
    rows.append({
        "job": "all", "ran": duration(total_s), "waited": duration(sum(waits) if waits else None), "lost": duration(lost_s),
        "GPU-hours": f"{hours:.1f}" if hours else "",
    })  # fmt: skip
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
