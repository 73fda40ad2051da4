"""Combines Slurm's job states with the run folder: jobs with verdicts and logs. `muster status` shows the result."""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.errors import Problem, SiteError
from conf.jobs import JOB_KINDS, RESUMABLE
from launcher import slurm
from launcher.run_folder import attempts, lock, record
from launcher.run_folder.status import COMPLETED
from launcher.status import missing_verdict, ownership

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

    @property
    def failed(self) -> bool:
        """Whether the job ended without completing, and will not start again by itself."""
        if self.verdict is None or self.verdict["status"] == COMPLETED:
            return False
        return not (self.verdict.get("requeued") and self.state in slurm.LIVE_STATES)


@dataclass(frozen=True)
class AttemptHistory:
    """The attempts of one start (submission) of a job."""

    number: int | None = None
    """Of the newest attempt; None before the first."""
    verdict: dict[str, Any] | None = None
    """Of the newest attempt; None while it runs."""
    before: list[dict[str, Any]] = field(default_factory=list)
    """Verdicts of the earlier attempts, oldest first."""
    began: float | None = None
    """When the newest attempt began, in seconds since 1970."""


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
    started = {run: record.newest_jobs(run) for run in runs}
    in_slurm = ask_slurm(started, strict)
    return {run: by_hand(run, states_of(run, jobs, in_slurm), strict) for run, jobs in started.items()}


def ask_slurm(
    started: Mapping[Path, Mapping[str, record.StartedJob]], strict: bool = False
) -> dict[str, slurm.SlurmJob]:
    """Return what Slurm knows about all these jobs of runs, which may be those of several users."""
    owners = {owner for run in started if (owner := record.other_owner(run))}
    ids = [job.job_id for jobs in started.values() for job in jobs.values() if job.cluster == "slurm"]
    return slurm.jobs(ids, ",".join(sorted(owners)) or None, strict)


def by_hand(run: Path, jobs: list[JobState], strict: bool = False) -> list[JobState]:
    """Add the jobs that wait in Slurm and whose scripts were submitted by hand, as after a launch with `submit=script`.

    Once such a job runs, it has opened an attempt, and is known by that. With `strict`, raises BusyError.
    """
    if not record.is_by_hand(run):
        return jobs
    try:
        found = unrecorded_jobs(run, jobs)
    except slurm.BusyError:
        if strict:
            raise
        return jobs
    waiting = {name: job for job in found if (name := _kind_of(job))}
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
    if job.cluster == "slurm":
        seen = in_slurm.get(job.job_id, slurm.SlurmJob(job.job_id, "UNKNOWN"))
        state, user, note, is_silent = seen.state, seen.user, seen.silence, bool(seen.silence)
        if not ownership.is_of_run(seen, run, job):
            state, note = "UNKNOWN", ownership.describe(seen)
        history = _attempts_of_slurm_job(folder, job.job_id)
        if history.verdict is None and not note:
            verdict = missing_verdict.explain(folder, job.job_id, state, history.number)
            history = replace(history, verdict=verdict)
    else:
        history = _all_attempts(folder)
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
    )


def _all_attempts(folder: Path) -> AttemptHistory:
    """Return the attempts of all starts of a job. On this machine every start is one attempt."""
    number, found = attempts.history(folder)
    verdicts = {verdict["attempt"]: verdict for verdict in found}
    if number is None:
        return AttemptHistory(before=found)
    newest = verdicts.pop(number, None)
    began = attempts.number((newest or attempts.begin_record(folder, number)).get("started"))
    return AttemptHistory(number, newest, list(verdicts.values()), began)


def _attempts_of_slurm_job(folder: Path, job_id: str) -> AttemptHistory:
    """Return the attempts that one Slurm job has made, without those of earlier submissions."""
    history = _all_attempts(folder)
    before = [verdict for verdict in history.before if str(verdict.get("job_id")) == job_id]
    newest = history.verdict
    if newest is None or "job_id" not in newest:
        newest = attempts.begin_record(folder, history.number) if history.number else {}
    if str(newest.get("job_id")) != job_id:  # the newest attempt is that of another submission
        return AttemptHistory(before=before)
    return replace(history, before=before)


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
    known = {job.job_id for job in jobs}
    try:
        own = [job for job in slurm.own_jobs() if job.state in slurm.LIVE_STATES and job.folder.endswith("/code")]
    except slurm.BusyError:
        raise
    except slurm.SlurmError:  # no cluster here: scripts can be written on any machine
        return []
    started = record.StartedJob("", "slurm")
    return [job for job in own if job.job_id not in known and ownership.is_of_run(job, run, started)]


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
