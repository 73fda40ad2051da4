"""Reads a run folder back: its jobs with their states, logs and verdicts. `python -m launcher` shows what this returns."""

import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError, SiteError
from launcher import record, slurm
from launcher.attempt import last_verdict
from launcher.plan import AFTER


@dataclass(frozen=True)
class JobState:
    """One job of a run as it stands: what the scheduler says, and what the last attempt left behind."""

    name: str
    job_id: str
    state: str
    verdict: dict[str, Any] | None


def job_states(run: Path, strict: bool = False) -> list[JobState]:
    """The newest start of each job, in the order of the pipeline; `strict` as in `slurm.states`."""
    newest = record.newest_jobs(run)
    on_slurm = slurm.states((job_id for job_id, cluster in newest.values() if cluster == "slurm"), strict)
    found = []
    for name in (name for name in AFTER if name in newest):
        job_id, cluster = newest[name]
        verdict = last_verdict(run / "jobs" / name)
        if verdict and str(verdict.get("job_id")) != job_id and cluster == "slurm":
            verdict = None  # an older start's
        state = (
            on_slurm.get(job_id, "UNKNOWN") if cluster == "slurm" else ("RUNNING" if _alive(job_id, run) else "ENDED")
        )
        found.append(JobState(name, job_id, state, verdict))
    return found


def active(run: Path) -> str | None:
    """Names the jobs of a run that wait or run, or None; a folder that is no run is not active.

    Raises SiteError when Slurm does not answer: to start a run twice would damage it.
    """
    if not (run / "run.json").exists():
        return None
    try:
        jobs = job_states(run, strict=True)
    except slurm.SlurmError as error:
        raise SiteError(
            Problem("run_dir", run, f"may be at work, and Slurm does not answer ({error}); try again")
        ) from error
    names = [f"{job.name} {job.job_id} is {job.state}" for job in jobs if job.state in slurm.LIVE]
    return ", ".join(names) or None


def cancel(run: Path) -> list[str]:
    """End the jobs of a run that wait or run, wherever they are; their names."""
    live = [job for job in job_states(run) if job.state in slurm.LIVE]
    newest = record.newest_jobs(run)
    on_slurm = [job.job_id for job in live if newest[job.name][1] == "slurm"]
    if on_slurm:
        slurm.cancel(on_slurm)
    for job in live:
        if job.job_id not in on_slurm:
            os.kill(int(job.job_id), signal.SIGINT)  # submitit's local controller then ends its ranks
    return [job.name for job in live]


def logs(run: Path, job: str, rank: int) -> Path:
    """The newest log of one rank. Raises RunError naming the ranks there are."""
    folder = run / "jobs" / job
    found = sorted(folder.glob(f"*_{rank}_log.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        ranks = sorted(
            {int(match[1]) for path in folder.glob("*_log.out") if (match := re.search(r"_(\d+)_log\.out$", path.name))}
        )
        there = (
            f"there are ranks {ranks[0]} to {ranks[-1]}"
            if ranks
            else f"the job has not written any; make status RUN={run}"
        )
        raise RunError(Problem("RANK", rank, f"no log of {job}: {there}"))
    return found[-1]


def _alive(process_id: str, run: Path) -> bool:
    """Whether a local job's controller still runs, and is this run's."""
    try:
        words = Path(f"/proc/{int(process_id)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return any(os.fsencode(str(run)) in word for word in words)
