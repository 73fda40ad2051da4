"""Draws what `muster status` shows of a run: one row for each job, the progress of training, and what failed."""

import time
from collections.abc import Sequence
from typing import Any

from conf.visible import visible
from launcher import slurm
from launcher.run_folder.log_lines import LOG_PREFIX
from launcher.run_folder.status import COMPLETED
from launcher.status import terminal
from launcher.status.overview import Overview, elapsed_s
from launcher.status.state import JobState
from launcher.status.tables import cell, duration

LOG_LINES = 5
"""Number of lines of a failed rank's log that are shown under the table."""
COLORED = ("state", "verdict")
HEADINGS = ("job", "id", "state", "attempt", "verdict", "step", "elapsed", "left", "where", "reason")


def show(overviews: Sequence[Overview]) -> None:
    """Print the table of each run, and under it the remedies and the last lines of what failed."""
    for overview in overviews:
        terminal.console().print(drawn(overview, with_name=len(overviews) > 1))
        for job in overview.jobs:
            if job.failed:
                _print_failure(job)


def drawn(overview: Overview, *, with_name: bool = False) -> Any:
    """Return the table and the progress of training, for rich to print. `with_name`: with the run's folder above them."""
    from rich.console import Group

    above = [cell(str(overview.run), style="bold")] if with_name else []
    text = training(overview)
    return Group(*above, _table(overview), *([cell(text)] if text else []))


def training(overview: Overview) -> str:
    """Return one line about the training: step of steps, loss, speed, and when it ends. Empty before the first step."""
    progress = overview.progress
    if progress.step is None:
        return ""
    parts = [f"step {progress.step}/{progress.steps}" if progress.steps else f"step {progress.step}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.tokens_per_s is not None:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.left_s is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + progress.left_s))
        parts.append(f"{duration(progress.left_s)} to go, until {end}")
    return "  ".join(["training", *parts])


def line(overview: Overview) -> str:
    """Return one line about a run for a log: the jobs that have not completed, and the training."""
    states = [
        f"{job.name} {job.verdict['status'] if job.verdict else job.state.lower()}"
        for job in overview.jobs
        if not job.verdict or job.verdict["status"] != COMPLETED
    ]
    return "  ".join([overview.run.name, ", ".join(states) or "completed", training(overview)]).rstrip()


def _table(overview: Overview) -> Any:
    from rich.table import Table

    rows = [_cells(overview, job) for job in overview.jobs]
    rows += [_cells_to_come(overview, name) for name in overview.to_come]
    shown = [index for index, heading in enumerate(HEADINGS) if heading == "reason" or any(row[index] for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in shown:
        table.add_column(HEADINGS[index], overflow="fold")
    for row in rows:
        looks = {index: terminal.style(row[index]) for index in shown if HEADINGS[index] in COLORED}
        table.add_row(*(cell(row[index], looks.get(index, "")) for index in shown))
    return table


def _cells(overview: Overview, job: JobState) -> tuple[str, ...]:
    verdict = job.verdict or {}
    has_failed_rank = verdict.get("rank") is not None and verdict.get("reason") and not verdict.get("ended_early")
    step = (job.beat or verdict).get("step")
    reasons = (_reason_and_next(verdict) or _activity(job.beat), overview.waits.get(job.name))
    return (
        job.name,
        job.job_id,
        job.state.lower(),
        "" if job.attempt is None else str(job.attempt),
        verdict.get("status", ""),
        "" if step is None else str(step),
        duration(elapsed_s(job)),
        duration(overview.left_s.get(job.name)) if job.state in slurm.LIVE_STATES else "",
        f"rank {verdict['rank']} on {verdict['host']}" if has_failed_rank else "",
        "; ".join(filter(None, reasons)),
    )


def _cells_to_come(overview: Overview, name: str) -> tuple[str, ...]:
    state = "to come" if overview.is_live else "not started"
    command = overview.not_submitted.get(name, "")
    return (name, "", "not submitted" if command else state, *[""] * (len(HEADINGS) - 4), command)


def _activity(heartbeat: dict[str, Any] | None) -> str:
    """Say what a running job is doing: phase and age of the last heartbeat of the rank that is furthest behind."""
    if heartbeat is None or "time" not in heartbeat:
        return ""
    return f"{heartbeat['phase']}, last heartbeat {max(0, time.time() - heartbeat['time']):.0f} s ago"


def _print_failure(job: JobState) -> None:
    """Print the remedy and the last lines of the log of the rank that failed first. `why` shows more."""
    verdict = job.verdict or {}
    if verdict.get("remedy"):
        _print(f"{job.name}: {verdict['remedy']}")
    if lines := _log_lines(verdict)[-LOG_LINES:]:
        _print("\n".join([f"{job.name}, last lines of its log:", *(f"  {line}" for line in lines)]))


def _log_lines(verdict: dict[str, Any]) -> list[str]:
    """The last lines of a failed rank's log, without those that repeat the verdict's reason or traceback."""
    known = {line.strip() for key in ("reason", "error") for line in str(verdict.get(key) or "").splitlines()}
    lines = str(verdict.get("log") or "").splitlines()
    return [line for line in lines if line.strip() and LOG_PREFIX.sub("", line).strip() not in known]


def attempts(job: JobState) -> None:
    """Print how each attempt of a job ended: one line for each earlier attempt, and all details of the newest."""
    for verdict in job.before:
        outcome(f"  attempt {verdict['attempt']}", verdict["status"], f": {_reason_and_next(verdict)}")
    newest = job.verdict
    if newest is None or newest["status"] == COMPLETED:
        return
    where = "" if newest.get("rank") is None else f" (rank {newest['rank']} on {newest['host']})"
    outcome(f"{job.name} {job.job_id}", newest["status"], f"{where}: {_reason_and_next(newest)}")
    if newest.get("remedy"):
        terminal.say(f"remedy: {newest['remedy']}", "bold", until=len("remedy:"))
    if newest.get("error"):
        _print(newest["error"])
    if lines := _log_lines(newest):
        _print("\n".join(["last lines of its log:", *lines]))


def outcome(job: str, status: str, rest: str = "") -> None:
    """Print a line about a job, whose status is colored."""
    terminal.say(f"{job} {status}{rest}", terminal.style(status), until=len(visible(f"{job} {status}")))


def _reason_and_next(verdict: dict[str, Any]) -> str:
    return "; ".join(text for text in (verdict.get("reason"), verdict.get("next")) if text)


def _print(text: str) -> None:
    print(visible(text))
