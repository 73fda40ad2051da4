"""Reads a run folder back: its jobs with their states, logs and verdicts. `python -m launcher` shows what this returns."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem, RunError, SiteError
from conf.files import write_text
from conf.jobs import JOB_KINDS
from launcher import slurm
from launcher.run_folder import attempts, record
from launcher.run_folder import attempts as history
from launcher.run_folder.status import COMPLETED


@dataclass(frozen=True)
class JobState:
    """One job of a run as it stands: what the scheduler says, and what its attempts left behind."""

    name: str
    job_id: str
    state: str
    verdict: dict[str, Any] | None
    """Of the newest attempt; None while that one runs."""
    attempt: int | None = None
    """Number of the newest attempt; None before the first."""
    before: list[dict[str, Any]] = field(default_factory=list)
    """Verdicts of the attempts before the newest, oldest first."""
    beat: dict[str, Any] | None = None
    """While it runs: the last heartbeat of the rank that is furthest behind."""

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than well, and does not start again by itself."""
        if self.verdict is None or self.verdict["status"] == COMPLETED:
            return False
        return not (self.verdict.get("requeued") and self.state in slurm.LIVE)


def job_states(run: Path, strict: bool = False) -> list[JobState]:
    """The newest start of each job, in the order of the pipeline; `strict` as in `slurm.states`."""
    newest = record.newest_jobs(run)
    on_slurm = slurm.states((job_id for job_id, cluster in newest.values() if cluster == "slurm"), strict)
    found = []
    for name in (name for name in JOB_KINDS if name in newest):
        job_id, cluster = newest[name]
        own = _own(run / "jobs" / name, job_id if cluster == "slurm" else None)
        state = (
            on_slurm.get(job_id, "UNKNOWN") if cluster == "slurm" else ("RUNNING" if _alive(job_id, run) else "ENDED")
        )
        at_work = state == "RUNNING" and own[0] is None and own[1] is not None
        found.append(JobState(name, job_id, state, *own, _beat(run / "jobs" / name, own[1]) if at_work else None))
    return found


def _own(folder: Path, job_id: str | None) -> tuple[dict[str, Any] | None, int | None, list[dict[str, Any]]]:
    """Verdict and number of the newest attempt that this start of the job has made, and the verdicts of those before.

    `job_id` null takes the attempts of all starts: here every attempt is a start.
    """
    number, verdict = history.newest(folder), history.last_verdict(folder)
    older = [item for item in history.verdicts(folder) if item["attempt"] != number]
    if job_id is None:
        return verdict, number, older
    begun = history.opened(folder, number) if number else {}
    older = [item for item in older if str(item.get("job_id")) == job_id]
    return (verdict, number, older) if str(begun.get("job_id")) == job_id else (None, None, older)


def _beat(folder: Path, number: int | None) -> dict[str, Any] | None:
    """The heartbeat of the rank that has got least far in an attempt, as far as its node has published it."""
    ranks = attempts.gathered(folder / f"attempt-{number}").values()
    return min((item for item in ranks if item["phase"] != "ended"), key=lambda item: item["count"], default=None)


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


def stop(run: Path) -> Path:
    """Ask the run's training to save and end, without Slurm: it looks for a file. Raises RunError where none runs."""
    job = next((job for job in job_states(run) if job.name == "train"), None)
    if job is None or job.state != "RUNNING":
        state = "no job" if job is None else job.state.lower()
        raise RunError(
            Problem("RUN", run, f"its training does not run ({state}); python -m launcher cancel {run} ends what waits")
        )
    path = run / "jobs" / "train" / "stop"
    write_text(path, "")
    return path


def logs(run: Path, job: str, rank: int) -> Path:
    """The log of one rank's newest attempt. Raises RunError naming the ranks there are."""
    folder = run / "jobs" / job
    found = sorted(_logs(folder, str(rank)), key=lambda path: path.stat().st_mtime)
    if not found:
        ranks = sorted({_rank(path) for path in _logs(folder, "*")})
        there = (
            f"there are ranks {ranks[0]} to {ranks[-1]}"
            if ranks
            else f"the job has not written any; make status RUN={run}"
        )
        raise RunError(Problem("RANK", rank, f"no log of {job}: {there}"))
    return found[-1]


def _logs(folder: Path, rank: str) -> list[Path]:
    """Logs of a rank, or with `*` of all: attempt-N/rank-R.log on Slurm, where ID_0_log.out is only the batch script's."""
    attempts = [*folder.glob(f"attempt-*/rank-{rank}.log")]
    batches = {
        str(history.opened(folder, path.parent.name.removeprefix("attempt-")).get("job_id")) for path in attempts
    }
    others = folder.glob(f"*_{rank}_log.out")
    return [*attempts, *(path for path in others if path.name.split("_")[0] not in batches)]


def _rank(log: Path) -> int:
    return int(log.stem.removeprefix("rank-") if log.suffix == ".log" else log.stem.split("_")[1])


def _alive(process_id: str, run: Path) -> bool:
    """Whether a local job's controller still runs, and is this run's."""
    try:
        words = Path(f"/proc/{int(process_id)}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return any(os.fsencode(str(run)) in word for word in words)
