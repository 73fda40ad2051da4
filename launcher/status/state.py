"""Combines Slurm's job states with the run folder: jobs with verdicts and logs. `muster status` shows the result."""

import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError, SiteError
from conf.files import write_text
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


def job_states(run: Path, strict: bool = False) -> list[JobState]:
    """Return the newest start of each job, in the order of the pipeline.

    `strict`: see `slurm.jobs`; also waits for a job that is about to start again. Raises RunError if `run` is not a run folder.
    """
    started, deadline = record.newest_jobs(run), time.monotonic() + STARTS_AGAIN_S
    ids = [job.job_id for job in started.values() if job.cluster == "slurm"]
    while True:
        jobs = states_of(run, started, slurm.jobs(ids, record.other_owner(run), strict))
        if not (strict and any(map(_starts_again, jobs))) or time.monotonic() > deadline:
            return jobs
        time.sleep(0.5)


def _starts_again(job: JobState) -> bool:
    """Whether Slurm may put an ended job back into the queue. For a moment, squeue shows it as ended (24.11: PREEMPTED)."""
    requeued = job.verdict is not None and job.verdict.get("requeued") is True
    return job.state in slurm.STARTED_AGAIN_AFTER or (requeued and job.state not in slurm.LIVE_STATES)


def states_of(
    run: Path, started: Mapping[str, record.StartedJob], in_slurm: Mapping[str, slurm.SlurmJob]
) -> list[JobState]:
    """The same from what `record.newest_jobs` and `slurm.jobs` have returned."""
    return [_job_state(run, name, started[name], in_slurm) for name in JOB_KINDS if name in started]


def _job_state(run: Path, name: str, job: record.StartedJob, in_slurm: Mapping[str, slurm.SlurmJob]) -> JobState:
    folder, user, note = run / "jobs" / name, "", ""
    if job.cluster == "slurm":
        seen = in_slurm.get(job.job_id, slurm.SlurmJob(job.job_id, "UNKNOWN"))
        state, user, note = seen.state, seen.user, seen.silence
        if not ownership.is_of_run(seen, run, job):
            state, note = "UNKNOWN", ownership.describe(seen)
        history = _attempts_of_slurm_job(folder, job.job_id)
        if history.verdict is None and not note:
            verdict = missing_verdict.explain(folder, job.job_id, state, history.number)
            history = replace(history, verdict=verdict)
    else:
        history = _all_attempts(folder)
        is_running = _is_alive(job.job_id, run) or (history.verdict is None and _is_elsewhere(lock.holder(run)))
        state = "RUNNING" if is_running else "ENDED"
    running = state == "RUNNING" and history.number is not None and history.verdict is None
    heartbeat = _slowest_heartbeat(folder, history.number) if running else None
    return JobState(name, job.job_id, state, history.verdict, history.number, history.before, heartbeat, user, note)


def _all_attempts(folder: Path) -> AttemptHistory:
    """Return the attempts of all starts of a job. On this machine every start is one attempt."""
    number = attempts.newest_attempt(folder)
    before = [verdict for verdict in attempts.verdicts(folder) if verdict["attempt"] != number]
    return AttemptHistory(number, attempts.last_verdict(folder), before)


def _attempts_of_slurm_job(folder: Path, job_id: str) -> AttemptHistory:
    """Return the attempts that one Slurm job has made, without those of earlier submissions."""
    history = _all_attempts(folder)
    before = [verdict for verdict in history.before if str(verdict.get("job_id")) == job_id]
    begin_record = attempts.begin_record(folder, history.number) if history.number else {}
    if str(begin_record.get("job_id")) != job_id:  # the newest attempt is that of another submission
        return AttemptHistory(before=before)
    return AttemptHistory(history.number, history.verdict, before)


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
        others = _unrecorded_jobs(run, jobs)
    except slurm.SlurmError as error:
        raise SiteError(
            Problem("run_dir", run, f"may be running already, and Slurm does not answer ({error}); try again later")
        ) from error
    names = [f"{job.name} {job.job_id} is {job.state}" for job in jobs if job.state in slurm.LIVE_STATES]
    names += [f"{job.name} {job.job_id} is {job.state}" for job in others]
    return ", ".join(names) or None


def _unrecorded_jobs(run: Path, jobs: Sequence[JobState]) -> list[slurm.SlurmJob]:
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


def cancel(run: Path) -> list[str]:
    """End the pending and running jobs of a run, on Slurm and on this machine. Returns their names.

    Raises RunError if they are another user's or on another host, and SlurmError if Slurm does not say which jobs still run.
    """
    started = record.newest_jobs(run)
    on_slurm = {name for name, job in started.items() if job.cluster == "slurm"}
    if on_slurm and not slurm.installed():
        raise SiteError(Problem("RUN", run, "is a run on Slurm, and squeue is not on PATH. Type this on a login node"))
    holder = lock.holder(run)
    if _is_elsewhere(holder):
        raise RunError(Problem("RUN", run, f"is used by {holder}. Type this there"))
    jobs = job_states(run, strict=True)
    live = [job for job in jobs if job.state in slurm.LIVE_STATES]
    for job in live:
        owner = job.user if job.name in on_slurm else record.other_owner(run)
        if owner and os.getuid() != 0 and owner != record.user_name(os.getuid()):
            raise RunError(
                Problem("RUN", run, f"{job.name} {job.job_id} is a job of {owner}: only {owner} can cancel it")
            )
    others = _unrecorded_jobs(run, jobs)
    slurm_ids = [job.job_id for job in live if job.name in on_slurm] + [job.job_id for job in others]
    if slurm_ids:
        slurm.cancel(slurm_ids)
    for job in live:
        if job.job_id not in slurm_ids:
            os.kill(int(job.job_id), signal.SIGINT)  # submitit's local controller then ends its ranks
    return [job.name for job in live] + [job.name for job in others]


def stop(run: Path) -> Path:
    """Ask the run's training to save and end, by a file that it looks for; works without Slurm. Returns the file.

    Raises RunError if no training is running, and SlurmError if Slurm does not say so.
    """
    job = next((job for job in job_states(run, strict=True) if job.name in RESUMABLE), None)
    if job is None or job.state != "RUNNING":
        state = "no job" if job is None else job.state.lower()
        raise RunError(
            Problem("RUN", run, f"training is not running ({state}). To end pending jobs: muster cancel {run}")
        )
    path = run / "jobs" / job.name / "stop"
    write_text(path, "")
    return path


def logs(run: Path, job: str, rank: int) -> Path:
    """Return the log of a rank's newest attempt. Raises RunError, which lists the ranks that have logs."""
    folder = run / "jobs" / job
    paths = sorted(_log_files(folder, str(rank)), key=lambda path: path.stat().st_mtime)
    if paths:
        return paths[-1]
    ranks = sorted({_rank_of_log(path) for path in _log_files(folder, "*")})
    if ranks:
        available = f"there are ranks {ranks[0]} to {ranks[-1]}"
    else:
        available = f"the job has not written any yet. Its state: muster status {run}"
    raise RunError(Problem("RANK", rank, f"no log of {job}: {available}"))


def training_job(run: Path) -> str:
    """Return the name of the run's job that trains: `train`, or `custom` for a program of the user."""
    return next((name for name in RESUMABLE if (run / "jobs" / name).is_dir()), "train")


def _log_files(folder: Path, rank: str) -> list[Path]:
    """Return the logs of a rank (`*`: of all ranks) in all attempts.

    On Slurm a rank logs to attempt-N/rank-R.log, and ID_0_log.out is only the batch script's log. The local executor
    writes ID_R_log.out for every rank R.
    """
    rank_logs = [*folder.glob(f"attempt-*/rank-{rank}.log")]
    slurm_ids = {
        str(attempts.begin_record(folder, path.parent.name.removeprefix("attempt-")).get("job_id"))
        for path in rank_logs
    }
    submitit_logs = folder.glob(f"*_{rank}_log.out")
    return [*rank_logs, *(path for path in submitit_logs if path.name.rsplit("_", 2)[0] not in slurm_ids)]


def _rank_of_log(log: Path) -> int:
    return int(log.stem.removeprefix("rank-") if log.suffix == ".log" else log.stem.rsplit("_", 2)[1])


def _is_elsewhere(holder: lock.Holder | None) -> bool:
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
