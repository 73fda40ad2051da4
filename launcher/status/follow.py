"""Prints the logs of the ranks of a job: what they have, or also what is added until the job ends."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conf.visible import visible
from launcher import slurm
from launcher.run_folder import lock
from launcher.run_folder.log_lines import LOG_PREFIX
from launcher.status import log_files, state

POLL_S = 0.5
"""Seconds between two looks at the logs."""
ASK_S = 10.0
"""Seconds between two questions to Slurm whether the job still runs. A verdict is seen at once."""
STAMP = len("2026-11-30 10:00:00")
SUBMITIT_TIME = re.compile(r"submitit [A-Z]+ \((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+\) - ")
"""Start of a line that submitit writes around the work of a rank."""


@dataclass
class _Log:
    """A log, and how far it has been read."""

    path: Path
    rank: int
    position: int = 0
    rest: bytes = b""
    """The start of a line whose end is not written yet."""
    stamp: str = ""
    """The time of the last line that has one."""

    def read(self, final: bool, now: str = "") -> list[tuple[str, str]]:
        """Return (time, line) of each new line. `final`: also of one that does not end yet.

        A line without a time of its own has `now`, or else that of the line before.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = self.rest + file.read()
                self.position = file.tell()
        except FileNotFoundError:
            return []
        *whole, self.rest = data.split(b"\n")
        if final and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        return [self._timed(part, now) for line in whole for part in _shown(line)]

    def _timed(self, line: str, now: str) -> tuple[str, str]:
        if LOG_PREFIX.match(line):
            self.stamp = line[:STAMP]
            return self.stamp, line
        if own := SUBMITIT_TIME.match(line):
            self.stamp = own[1]
            return self.stamp, line
        return now or self.stamp, line


@dataclass
class Follower:
    """Prints the logs of one job: of `rank`, or of all ranks (None) with the rank before each line."""

    run: Path
    job: str
    rank: int | None
    with_time: bool = False
    """Put a time before each line that has none: that of the line before, or the time at which a new line is read."""
    _logs: dict[Path, _Log] = field(default_factory=dict)
    _known: set[Path] = field(default_factory=set)

    def show(self) -> None:
        """Print what the newest attempt has. Raises RunError if it has no log."""
        self._open()
        self._print(final=True)

    def follow(self, is_over: Callable[[], str | None]) -> None:
        """Print that, then every new line, also of new attempts, until `is_over` returns why the job is over."""
        waits = False
        while not log_files.of_rank(self.run / "jobs" / self.job, self.rank):
            if is_over() is not None:
                break
            if not waits:
                print(f"{self.job} has no log yet: waiting", flush=True)
                waits = True
            time.sleep(POLL_S)
        self._open()
        self._print(final=False)
        while True:
            reason = is_over()  # before reading, so that the last lines are read after the end
            self._add_new_attempts()
            self._print(final=reason is not None, now=time.strftime("%Y-%m-%d %H:%M:%S") if self.with_time else "")
            if reason is not None:
                print(visible(f"==> {reason}"), flush=True)
                return
            time.sleep(POLL_S)

    def _open(self) -> None:
        if self.rank is not None:
            paths = [log_files.newest(self.run, self.job, self.rank)]
        else:
            paths = log_files.newest_of_all(self.run, self.job)
        self._known = {*log_files.of_rank(self.run / "jobs" / self.job, self.rank)}
        self._add(paths)

    def _add_new_attempts(self) -> None:
        found = log_files.of_rank(self.run / "jobs" / self.job, self.rank)
        self._add([path for path in found if path not in self._known])
        self._known.update(found)

    def _add(self, paths: list[Path]) -> None:
        for path in paths:
            self._logs[path] = _Log(path, log_files.rank_of(path))
            print(f"==> {path}", flush=True)

    def _print(self, final: bool, now: str = "") -> None:
        """Print the new lines of all logs by time; those of one second by rank."""
        read = [(stamp, log.rank, line) for log in self._logs.values() for stamp, line in log.read(final, now)]
        width = len(str(max((log.rank for log in self._logs.values()), default=0)))
        for stamp, rank, line in sorted(read, key=lambda item: item[0]) if self.rank is None else read:
            time_ = f"{stamp or ' ' * STAMP} " if self.with_time and not LOG_PREFIX.match(line) else ""
            prefix = f"rank {rank:<{width}} | " if self.rank is None else ""
            print(f"{prefix}{time_}{line}")
        if read:
            print(end="", flush=True)


def _shown(line: bytes) -> Iterator[str]:
    """Yield the parts of a line as a terminal may get them: a progress bar writes many into one line."""
    text = line.decode(errors="replace").removesuffix("\r")
    yield from visible(text).split("\n")


class End:
    """Tells whether a job is over. Called often, it asks Slurm seldom."""

    def __init__(self, run: Path, job: str) -> None:
        self.run, self.job = run, job
        self._ask_at = 0.0
        self._verdicts = -1
        self._gone_since: float | None = None

    def __call__(self) -> str | None:
        """Return how the job has ended; None while it waits or runs, or starts again."""
        verdicts = sum(1 for _ in (self.run / "jobs" / self.job).glob("attempt-*.json"))
        if time.monotonic() < self._ask_at and verdicts == self._verdicts:
            return None
        self._verdicts = verdicts
        jobs = state.job_states(self.run)
        on_slurm = any(job.cluster == "slurm" for job in jobs)
        self._ask_at = time.monotonic() + (ASK_S if on_slurm else 1.0)
        found = next((job for job in jobs if job.name == self.job), None)
        if found is None:
            return self._without_job(jobs)
        return self._of(found)

    def _of(self, job: state.JobState) -> str | None:
        if job.verdict and not job.verdict.get("requeued"):
            return f"{job.name} {job.verdict['status']}"
        # a launch on this machine writes the verdict a moment after the last rank has ended
        is_held = job.cluster == "local" and job.verdict is None and lock.holder(self.run) is not None
        if job.state in slurm.LIVE_STATES or job.is_silent or is_held:
            self._gone_since = None
            return None
        if state.starts_again(job):
            now = time.monotonic()
            self._gone_since = self._gone_since or now
            self._ask_at = now + 1.0
            if now - self._gone_since < state.STARTS_AGAIN_S:
                return None
        return f"{job.name} {job.verdict['status'] if job.verdict else job.state.lower()}"

    def _without_job(self, jobs: list[state.JobState]) -> str | None:
        """Of a job that has not started: it is over if nothing of the run is pending or running any more."""
        live = any(job.state in slurm.LIVE_STATES for job in jobs)
        return None if live or lock.holder(self.run) else f"{self.job} was not started"
