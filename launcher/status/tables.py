"""Prints tables about a run: the states of its jobs, how its attempts ended, and the result at the end."""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from conf.files import read_json
from conf.visible import visible
from launcher.run_folder.attempts import metrics
from launcher.run_folder.log_lines import LOG_PREFIX
from launcher.run_folder.status import COMPLETED
from launcher.status.comparison_table import Table as ComparisonTable
from launcher.status.listing import Summary
from launcher.status.state import JobState

LOG_LINES = 5
"""Number of lines of a failed rank's log that are shown under the table."""


def status(jobs: Iterable[JobState], waits: Mapping[str, str] | None = None) -> None:
    """Print one row per job: its state, the newest attempt's verdict with rank and host, the reason and what comes next.

    `waits`: why each pending job waits, by name.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "id", "state", "attempt", "verdict", "step", "where", "reason"):
        table.add_column(heading, overflow="fold")
    jobs = list(jobs)
    for job in jobs:
        verdict = job.verdict or {}
        has_failed_rank = verdict.get("rank") is not None and verdict.get("reason")
        step = (job.beat or verdict).get("step")
        cells = (
            job.name,
            job.job_id,
            job.state.lower(),
            "" if job.attempt is None else str(job.attempt),
            verdict.get("status", ""),
            "" if step is None else str(step),
            f"rank {verdict['rank']} on {verdict['host']}" if has_failed_rank else "",
            "; ".join(filter(None, [_reason_and_next(verdict) or _activity(job.beat), (waits or {}).get(job.name)])),
        )
        table.add_row(*map(_cell, cells))
    _console().print(table)
    for job in jobs:
        if job.failed and job.verdict:
            _print_failure(job.name, job.verdict)


def runs(found: Sequence[Summary], folder: Path) -> None:
    """Print one row per run: its name below `folder`, state, step, loss, time left and age."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "state", "step", "loss", "left", "launched"):
        table.add_column(heading, overflow="fold")
    for item in found:
        step = "" if item.step is None else f"{item.step}/{item.steps}" if item.steps else str(item.step)
        cells = (
            str(item.run.relative_to(folder)) if item.run != folder else item.run.name,
            item.state,
            step,
            "" if item.loss is None else f"{item.loss:.4f}",
            "" if item.left_s is None else str(timedelta(seconds=round(item.left_s))),
            "" if item.launched is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(item.launched)),
        )
        table.add_row(*map(_cell, cells))
    _console().print(table)


def comparison(found: ComparisonTable) -> None:
    """Print one row per run that is compared, the best in bold, and what to keep in mind."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in found.headings:
        table.add_column(_cell(heading), overflow="fold")
    for number, cells in enumerate(found.rows):
        table.add_row(*map(_cell, cells), style="bold" if number == found.best else None)
    _console().print(table)
    for note in found.notes:
        _print(f"note: {note}")


def _activity(heartbeat: dict[str, Any] | None) -> str:
    """Say what a running job is doing: phase and age of the last heartbeat of the rank that is furthest behind."""
    if heartbeat is None or "time" not in heartbeat:
        return ""
    return f"{heartbeat['phase']}, last heartbeat {max(0, time.time() - heartbeat['time']):.0f} s ago"


def _print_failure(name: str, verdict: dict[str, Any]) -> None:
    """Print the remedy and the last lines of the log of the rank that failed first. `why` shows more."""
    if verdict.get("remedy"):
        _print(f"{name}: {verdict['remedy']}")
    lines = _log_lines(verdict)[-LOG_LINES:]
    if lines:
        _print("\n".join([f"{name}, last lines of its log:", *(f"  {line}" for line in lines)]))


def _log_lines(verdict: dict[str, Any]) -> list[str]:
    """The last lines of a failed rank's log, without those that repeat the verdict's reason or traceback."""
    known = {line.strip() for key in ("reason", "error") for line in str(verdict.get(key) or "").splitlines()}
    lines = str(verdict.get("log") or "").splitlines()
    return [line for line in lines if line.strip() and LOG_PREFIX.sub("", line).strip() not in known]


def attempts(job: JobState) -> None:
    """Print how each attempt of a job ended: one line for each earlier attempt, and all details of the newest."""
    for verdict in job.before:
        _print(f"  attempt {verdict['attempt']} {verdict['status']}: {_reason_and_next(verdict)}")
    newest = job.verdict
    if newest is None or newest["status"] == COMPLETED:
        return
    where = "" if newest.get("rank") is None else f" (rank {newest['rank']} on {newest['host']})"
    _print(f"{job.name} {job.job_id} {newest['status']}{where}: {_reason_and_next(newest)}")
    if newest.get("remedy"):
        _print(f"remedy: {newest['remedy']}")
    if newest.get("error"):
        _print(newest["error"])
    if lines := _log_lines(newest):
        _print("\n".join(["last lines of its log:", *lines]))


def _reason_and_next(verdict: dict[str, Any]) -> str:
    return "; ".join(text for text in (verdict.get("reason"), verdict.get("next")) if text)


def show_result(run: Path) -> None:
    """Print the result of a run: losses, speed, sizes, the folder of the model, and a sample of its answers."""
    from rich.table import Table

    table = Table(title=_cell(run.name), title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in result_rows(run):
        table.add_row(_cell(name), _cell(value))
    _console().print("", table)


def result_rows(run: Path) -> list[tuple[str, str]]:
    """Return name and value of each line of the result table. A job that did not run adds no line."""
    rows: list[tuple[str, str]] = []
    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    if steps:
        rates = sorted(line["tokens_per_s"] for line in steps)
        rows += [
            ("steps", str(steps[-1]["step"])),
            ("training loss", f"{steps[0]['loss']:.4f} first, {steps[-1]['loss']:.4f} last"),
            ("tokens/s", f"{rates[len(rates) // 2]:,.0f} (median step, all ranks)"),
        ]
    if held_out:
        rows.append(("held-out loss", f"{held_out[0]:.4f} before, {held_out[-1]:.4f} after training"))
    merged = read_json(run / "evaluate.json") or {"loss": None}
    if merged["loss"] is not None:  # null where nothing is held out
        rows.append(("merged model", f"held-out loss {merged['loss']:.4f}, perplexity {merged['perplexity']:.2f}"))
    for name in ("data", "checkpoints", "model"):
        if (run / name).is_dir():
            rows.append((f"{name}/", f"{_folder_bytes(run / name) / 2**20:,.1f} MiB"))
    rows.append(("run", str(run)))
    if (run / "model").is_dir():
        rows.append(("model", str(run / "model")))
    answers: list[dict[str, Any]] = (read_json(run / "generations.json") or {}).get("answers", [])
    if answers:
        rows.append(("sample", f"{answers[0]['prompt']}\n{answers[0]['answer']}"))
    return rows


def _print(text: str) -> None:
    print(visible(text))


def _cell(text: str) -> Any:
    """Return a cell with exactly this text: rich would take the brackets in a plain string for markup."""
    from rich.text import Text

    return Text(visible(text))


def _console() -> Any:
    """Return a console. Without a terminal its lines are long and not folded, because people grep them."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=240)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
