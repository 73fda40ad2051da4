"""Combines Slurm's job states with the run folder: jobs with verdicts and logs. `muster status` shows the result."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import Problem, SiteError
from conf.jobs import JOB_KINDS, RESUMABLE
from launcher import slurm
from launcher.run_folder import attempts, lock, record
from launcher.run_folder.status import COMPLETED, FAILED
from launcher.status import missing_verdict, ownership
from launcher.status.attempt_history import of_all_starts, of_slurm_job
from launcher.supervise import report_page

T = TypeVar("T")
STARTS_AGAIN_S = 5.0
"""How long an ended job is watched that Slurm may put back into the queue."""


@dataclass(frozen=True)
class JobState:
    """The current state of one job of a run, from the scheduler and from the job's attempts."""

    name: str
    job_id: str
    state: str
    """Slurm's state, or UNKNOWN; RUNNING or ENDED for a job on this machine."""
    verdict: dict[str, Any] | None
    """The verdict of the newest attempt, or why the job ended without one; None while it waits or runs."""
    attempt: int | None = None
    """Number of the newest attempt; None before the first."""
    before: list[dict[str, Any]] = field(default_factory=list)
    """Verdicts of the earlier attempts, oldest first."""
    beat: dict[str, Any] | None = None
    """While the job runs: the last heartbeat of the rank that is furthest behind."""
    user: str = ""
    """Whose job it is in Slurm; empty if Slurm did not say so."""
    note: str = ""
    """Why the state is UNKNOWN, if that is known."""
    is_silent: bool = False
    """Whether it is UNKNOWN because Slurm did not answer: the job may still wait or run."""
    cluster: str = "slurm"
    """Where it runs: `slurm` or `local`."""
    began: float | None = None
    """When the newest attempt began, in seconds since 1970; None before the first."""
    gpu_s: float | None = None
    """GPUs times seconds of all attempts, also of earlier submissions; None if no attempt has recorded its GPUs."""

    @property
    def failed(self) -> bool:
        """Whether the job ended without completing, and will not start again by itself."""
        if self.verdict is None or self.verdict["status"] == COMPLETED:
            return False
        return not (self.verdict.get("requeued") and self.state in slurm.LIVE_STATES)


def job_states(run: Path, strict: bool = False) -> list[JobState]:
    """Return the newest start of each job, in the order of the pipeline.

    `strict`: see `slurm.jobs`; also waits for a job that is about to start again. Raises RunError if `run` is not a run folder.
    """
    deadline = time.monotonic() + STARTS_AGAIN_S
    while True:
        jobs = of_runs([run], strict)[run]
        if not (strict and any(map(starts_again, jobs))) or time.monotonic() > deadline:
            return jobs
        time.sleep(0.5)


def of_runs(runs: Sequence[Path], strict: bool = False) -> dict[Path, list[JobState]]:
    """Return the same of several runs. Slurm is asked once for all of them."""
    launches = {run: record.read_launches(run) for run in runs}
    return of_launches(launches, strict)


def of_launches(
    launches: Mapping[Path, list[dict[str, Any]]], strict: bool = False, closed: dict[Path, OSError] | None = None
) -> dict[Path, list[JobState]]:
    """Return the same from what `record.read_launches` has returned of each run.

    Also finds jobs that wait in Slurm and whose scripts were submitted by hand, as after a launch with `submit=script`. Once such
    a job runs, it has opened an attempt, and is known by that. `closed` gets the error of each run that cannot be read; without
    it, the error is raised.
    """

    started = _of_each(launches, lambda run: record.newest_jobs_of(run, launches[run]), closed)
    in_slurm = ask_slurm(started, strict)
    jobs = _of_each(started, lambda run: states_of(run, started[run], in_slurm), closed)
    for run, listed in jobs.items():
        settle_page(run, listed)
    if not any(record.is_by_hand(launches[run]) for run in jobs):
        return jobs
    try:
        own = slurm.own_jobs()
    except slurm.BusyError:
        if strict:
            raise
        return jobs
    except slurm.SlurmError:  # no cluster here: scripts can be written on any machine
        return jobs
    return {
        run: _with_those_by_hand(run, found, own) if record.is_by_hand(launches[run]) else found
        for run, found in jobs.items()
    }


def _of_each(runs: Iterable[Path], work: Callable[[Path], T], closed: dict[Path, OSError] | None) -> dict[Path, T]:
    """Return the result of `work` for each run. `closed` gets the error of each that cannot be read; without it, it is raised."""
    found = {}
    for run in runs:
        try:
            found[run] = work(run)
        except OSError as error:
            if closed is None:
                raise
            closed[run] = error
    return found


def ask_slurm(
    started: Mapping[Path, Mapping[str, record.StartedJob]], strict: bool = False
) -> dict[str, slurm.SlurmJob]:
    """Return what Slurm knows about all these jobs of runs, which may be those of several users."""
    owners = {owner for run in started if (owner := record.other_owner(run))}
    ids = [job.job_id for jobs in started.values() for job in jobs.values() if job.cluster == "slurm"]
    return slurm.jobs(ids, ",".join(sorted(owners)) or None, strict)


def _with_those_by_hand(run: Path, jobs: list[JobState], own: Sequence[slurm.SlurmJob]) -> list[JobState]:
    waiting = {name: job for job in _starting_in(run, jobs, own) if (name := _kind_of(job))}
    newest = {job.name: job for job in jobs} | {
        name: JobState(name, job.job_id, job.state, None, user=job.user) for name, job in waiting.items()
    }
    return [newest[name] for name in JOB_KINDS if name in newest]


def _kind_of(job: slurm.SlurmJob) -> str | None:
    """Return the kind of a job from its script, RUN/jobs/KIND.sbatch, or from its name, MODEL/KIND."""
    names = (Path(job.script).stem, job.name.rpartition("/")[2])
    return next((name for name in names if name in JOB_KINDS), None)


def starts_again(job: JobState) -> bool:
    """Whether Slurm may put an ended job back into the queue. For a moment, squeue shows it as ended (24.11: PREEMPTED)."""
    requeued = job.verdict is not None and job.verdict.get("requeued") is True
    return job.state in slurm.STARTED_AGAIN_AFTER or (requeued and job.state not in slurm.LIVE_STATES)


def states_of(
    run: Path, started: Mapping[str, record.StartedJob], in_slurm: Mapping[str, slurm.SlurmJob]
) -> list[JobState]:
    """The same from what `record.newest_jobs` and `slurm.jobs` have returned."""
    return [_job_state(run, name, started[name], in_slurm) for name in JOB_KINDS if name in started]


def _job_state(run: Path, name: str, job: record.StartedJob, in_slurm: Mapping[str, slurm.SlurmJob]) -> JobState:
    folder, user, note, is_silent = run / "jobs" / name, "", "", False
    number, found = attempts.history(folder)
    everything = of_all_starts(folder, number, found)
    if job.cluster == "slurm":
        seen = in_slurm.get(job.job_id, slurm.SlurmJob(job.job_id, "UNKNOWN"))
        state, user, note, is_silent = seen.state, seen.user, seen.silence, bool(seen.silence)
        if not ownership.is_of_run(seen, run, job):
            state, note = "UNKNOWN", ownership.describe(seen)
        history = of_slurm_job(everything, job.job_id)
        if history.verdict is None and not note:
            verdict = missing_verdict.explain(folder, job.job_id, state, history.number)
            history = replace(history, verdict=verdict)
    else:
        history = everything
        is_running = _is_alive(job.job_id, run) or (history.verdict is None and is_elsewhere(lock.holder(run)))
        state = "RUNNING" if is_running else "ENDED"
    running = state == "RUNNING" and history.number is not None and history.verdict is None
    heartbeat = _slowest_heartbeat(folder, history.number) if running else None
    return JobState(
        name,
        job.job_id,
        state,
        history.verdict,
        history.number,
        history.before,
        beat=heartbeat,
        user=user,
        note=note,
        is_silent=is_silent,
        cluster=job.cluster,
        began=history.began,
        gpu_s=attempts.gpu_seconds(folder, number, found, is_live=running),
    )


def _slowest_heartbeat(folder: Path, number: int | None) -> dict[str, Any] | None:
    """Return the published heartbeat of the rank that is furthest behind in an attempt; None if there is none."""
    heartbeats = attempts.published_ranks(folder / f"attempt-{number}").values()
    running = (heartbeat for heartbeat in heartbeats if heartbeat["phase"] != "ended")
    return min(running, key=lambda heartbeat: heartbeat.get("count", 0), default=None)


def active_jobs(run: Path) -> str | None:
    """Return the pending and running jobs of a run as text; None if there are none, or if the folder is not a run.

    Raises SiteError if Slurm does not answer: starting a run twice would damage it.
    """
    if not (run / "run.json").exists():
        return None
    try:
        jobs = job_states(run, strict=True)
        others = unrecorded_jobs(run, jobs)
    except slurm.SlurmError as error:
        raise SiteError(
            Problem("run_dir", run, f"may be running already, and Slurm does not answer ({error}); try again later")
        ) from error
    names = [f"{job.name} {job.job_id} is {job.state}" for job in jobs if job.state in slurm.LIVE_STATES]
    names += [f"{job.name} {job.job_id} is {job.state}" for job in others]
    return ", ".join(names) or None


def unrecorded_jobs(run: Path, jobs: Sequence[JobState]) -> list[slurm.SlurmJob]:
    """Return the pending and running Slurm jobs that start in the run's folder and are not in `jobs`.

    A script may have been submitted by hand, and launch.py may have been killed before it recorded a job. Raises BusyError.
    """
    if not any(run.glob("jobs/*.sbatch")):  # it was never launched on Slurm
        return []
    try:
        own = slurm.own_jobs()
    except slurm.BusyError:
        raise
    except slurm.SlurmError:  # no cluster here: scripts can be written on any machine
        return []
    return _starting_in(run, jobs, own)


def _starting_in(run: Path, jobs: Sequence[JobState], own: Sequence[slurm.SlurmJob]) -> list[slurm.SlurmJob]:
    """Return the pending and running jobs of `own` that start in the run's folder and are not in `jobs`."""
    known, started = {job.job_id for job in jobs}, record.StartedJob("", "slurm")
    live = [job for job in own if job.state in slurm.LIVE_STATES and job.folder.endswith("/code")]
    return [job for job in live if job.job_id not in known and ownership.is_of_run(job, run, started)]


def is_elsewhere(holder: lock.Holder | None) -> bool:
    """Return whether the process that runs the jobs is on another host, where its ids mean nothing here."""
    return holder is not None and holder.host != socket.gethostname()


def _is_alive(process_id: str, run: Path) -> bool:
    """Return whether a local job's controller is running. The id may belong to another process by now, so check its words."""
    try:
        words = Path(f"/proc/{int(process_id)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    real = os.fsencode(os.path.realpath(run))  # the process may have got a path through a symbolic link
    # a word that is no absolute path says nothing about a folder
    paths = (os.path.realpath(word) for word in words if word.startswith(b"/"))
    return any(path == real or path.startswith(real + b"/") for path in paths)


def training_job(run: Path) -> str:
    """Return the name of the run's job that trains: `train`, or `custom` for a program of the user."""
    return next((name for name in JOB_KINDS if name in RESUMABLE and (run / "jobs" / name).is_dir()), "train")


def settle_page(run: Path, jobs: Sequence[JobState]) -> None:
    """Write how a training has ended onto RUN/report.html, if it was killed before it could do so."""
    for job in jobs:
        if job.name in RESUMABLE and job.state not in slurm.LIVE_STATES:
            if job.verdict and job.verdict["status"] != COMPLETED:
                report_page.settle(run, job.verdict)
            elif job.verdict is None and job.state == "ENDED":
                report_page.settle(run, {"status": FAILED, "reason": "its processes are gone, and left no verdict"})
