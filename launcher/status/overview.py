"""Gathers all that `muster status` shows of runs: jobs, why they wait, times, progress, and the jobs that are still to come."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.jobs import AFTER_TRAINING, BEFORE_TRAINING, JOB_KINDS, RESUMABLE
from launcher import slurm
from launcher.run_folder import lock, record, sweep_record
from launcher.run_folder.attempts import number
from launcher.status import pending, scripts, state
from launcher.status.progress import Progress
from launcher.status.progress import read as read_progress
from launcher.status.state import JobState

MERGES_BEST = "  merge: best"
"""The line of sweep.merge in config.yaml."""


@dataclass(frozen=True)
class Overview:
    """One run as `muster status` shows it."""

    run: Path
    jobs: list[JobState]
    waits: dict[str, str] = field(default_factory=dict)
    """Why each pending job waits, by name."""
    left_s: dict[str, float] = field(default_factory=dict)
    """Seconds until Slurm's time limit of each running job, by name."""
    progress: Progress = field(default_factory=Progress)
    """Of the job that trains."""
    to_come: tuple[str, ...] = ()
    """Jobs of the run that have not been started."""
    not_submitted: dict[str, str] = field(default_factory=dict)
    """The jobs whose scripts wait for the user, and the command that submits each."""
    is_held: bool = False
    """Whether a launch on some machine is starting jobs of the run."""

    @property
    def is_live(self) -> bool:
        """Whether something of the run is pending or running."""
        return self.is_held or any(job.state in slurm.LIVE_STATES for job in self.jobs)

    @property
    def failed(self) -> bool:
        """Whether a job has failed."""
        return any(job.failed for job in self.jobs)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield each job with everything that is known of it, for JSON."""
        for job in self.jobs:
            yield asdict(job) | {
                "run": str(self.run),
                "failed": job.failed,
                "waits_for": self.waits.get(job.name),
                "elapsed_s": elapsed_s(job),
                "time_left_s": self.left_s.get(job.name),
                "progress": asdict(self.progress) if job.name in RESUMABLE else None,
            }
        for name in self.to_come:
            state_of = "NOT_SUBMITTED" if name in self.not_submitted else "TO_COME"
            command = self.not_submitted.get(name)
            yield asdict(JobState(name, "", state_of, None)) | {
                "run": str(self.run),
                "failed": False,
                "submit": command,
            }


def elapsed_s(job: JobState) -> float | None:
    """Return how long the newest attempt of a job has run, or ran; None before the first."""
    if job.began is None:
        return None
    ended = number((job.verdict or {}).get("ended"))
    if job.verdict is None and job.state in slurm.LIVE_STATES:
        ended = time.time()
    return None if ended is None else max(0.0, ended - job.began)


def read(runs: Sequence[Path]) -> list[Overview]:
    """Return what is known of the runs. Slurm is asked once for the states of all jobs. Raises RunError, BusyError."""
    launches = {run: record.read_launches(run) for run in runs}
    found = state.of_launches(launches)
    running = [
        job.job_id for jobs in found.values() for job in jobs if job.cluster == "slurm" and job.state == "RUNNING"
    ]
    left_s: dict[str, float] = {}
    with suppress(slurm.SlurmError):  # the states are there already
        left_s = slurm.all_seconds_left(running)
    return [_overview(run, launches[run], jobs, left_s) for run, jobs in found.items()]


def _overview(run: Path, launches: list[dict[str, Any]], jobs: list[JobState], left_s: dict[str, float]) -> Overview:
    not_submitted = scripts.not_submitted(run, launches, jobs)
    jobs = [job for job in jobs if job.name not in not_submitted]
    planned = _planned(run) | not_submitted.keys()
    progress = read_progress(run)
    if not any(job.name in RESUMABLE and job.state == "RUNNING" for job in jobs):
        progress = Progress(progress.step, progress.steps, progress.loss, progress.tokens_per_s)
    return Overview(
        run,
        jobs,
        pending.reasons(jobs),
        {job.name: left_s[job.job_id] for job in jobs if job.job_id in left_s},
        progress,
        tuple(name for name in JOB_KINDS if name in planned - {job.name for job in jobs}),
        not_submitted,
        lock.holder(run) is not None,
    )


def _planned(run: Path) -> set[str]:
    """Return the jobs that the run's config asks for.

    Of a run of a sweep, those that are its own: other runs may do its preprocess job, and only the best run may be merged.
    """
    names, lines = configured_jobs(run)
    if sweep_record.is_sweep(run.parent):
        names -= BEFORE_TRAINING | (AFTER_TRAINING if MERGES_BEST in lines else frozenset())
    return names & JOB_KINDS.keys()


def configured_jobs(run: Path) -> tuple[set[str], list[str]]:
    """Return the names under `jobs` in a run's config.yaml, and all lines of it. OmegaConf would take far longer."""
    try:
        lines = (run / "config.yaml").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set(), []
    names: set[str] = set()
    if "jobs:" in lines:
        for line in lines[lines.index("jobs:") + 1 :]:
            if not line.startswith("- "):
                break
            names.add(line[2:].strip())
    return names, lines
