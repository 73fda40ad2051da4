"""Prints tables about a run for people to read: the states of its jobs, and what came of it at the end."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conf.files import read_json
from launcher.run_folder.attempts import metrics
from launcher.status.state import JobState

LINES = 5
"""Of a failed rank's log, under the table."""


def status(jobs: Iterable[JobState]) -> None:
    """One row a job: state, verdict of the newest attempt with rank and host, why it ended and what comes next."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "id", "state", "attempt", "verdict", "step", "where", "reason"):
        table.add_column(heading, overflow="fold")
    found = list(jobs)
    for job in found:
        verdict = job.verdict or {}
        where = (
            ""
            if verdict.get("rank") is None or not verdict.get("reason")
            else f"rank {verdict['rank']} on {verdict['host']}"
        )
        step = (job.beat or verdict).get("step")
        table.add_row(
            job.name,
            job.job_id,
            job.state.lower(),
            "" if job.attempt is None else str(job.attempt),
            verdict.get("status", ""),
            "" if step is None else str(step),
            where,
            _line(verdict) or _at_work(job.beat),
        )
    _console().print(table)
    for job in (job for job in found if job.failed and job.verdict):
        _failure(job.name, job.verdict or {})


def _at_work(beat: dict[str, Any] | None) -> str:
    """What a running job does: the phase and age of the last heartbeat of the rank that is furthest behind."""
    if beat is None:
        return ""
    return f"{beat['phase']}, last heartbeat {max(0, time.time() - beat['time']):.0f} s ago"


def _failure(name: str, verdict: dict[str, Any]) -> None:
    """What helps, and the last lines of the log of the rank that failed first; `why` has more."""
    if verdict.get("remedy"):
        print(f"{name}: {verdict['remedy']}")
    lines = str(verdict.get("log") or "").splitlines()[-LINES:]
    if lines:
        print("\n".join([f"{name}, last lines of its log:", *(f"  {line}" for line in lines)]))


def attempts(job: JobState) -> None:
    """How each attempt of a job ended: a line for those before, and all that is known of the newest."""
    for verdict in job.before:
        print(f"  attempt {verdict['attempt']} {verdict['status']}: {_line(verdict)}")
    newest = job.verdict
    if newest is None or newest["status"] == "completed":
        return
    where = "" if newest.get("rank") is None else f" (rank {newest['rank']} on {newest['host']})"
    print(f"{job.name} {job.job_id} {newest['status']}{where}: {_line(newest)}")
    for title in ("remedy", "error", "log"):
        if text := newest.get(title):
            print(
                text
                if title == "error"
                else f"{title}: {text}"
                if title == "remedy"
                else f"last lines of its log:\n{text}"
            )


def _line(verdict: dict[str, Any]) -> str:
    return "; ".join(item for item in (verdict.get("reason"), verdict.get("next")) if item)


def show(run: Path) -> None:
    """What came of the run: losses, speed, sizes, where the model is, and a sample of its answers."""
    from rich.table import Table

    table = Table(title=f"{run.name}", title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows(run):
        table.add_row(name, value)
    _console().print("", table)


def rows(run: Path) -> list[tuple[str, str]]:
    """The lines of the final table; a job that did not run has none."""
    found: list[tuple[str, str]] = []
    lines = metrics(run)
    steps = [item for item in lines if "loss" in item]
    held_out = [item["eval_loss"] for item in lines if "eval_loss" in item]
    if steps:
        rates = sorted(item["tokens_per_s"] for item in steps)
        found += [
            ("steps", str(steps[-1]["step"])),
            ("training loss", f"{steps[0]['loss']:.4f} first, {steps[-1]['loss']:.4f} last"),
            ("tokens/s", f"{rates[len(rates) // 2]:,.0f} (median step, all ranks)"),
        ]
    if held_out:
        found.append(("held-out loss", f"{held_out[0]:.4f} before, {held_out[-1]:.4f} after training"))
    if merged := read_json(run / "evaluate.json"):
        found.append(("merged model", f"held-out loss {merged['loss']:.4f}, perplexity {merged['perplexity']:.2f}"))
    for name in ("data", "checkpoints", "model"):
        if (run / name).is_dir():
            found.append((f"{name}/", f"{_size(run / name) / 2**20:,.1f} MiB"))
    found.append(("run", str(run)))
    if (run / "model").is_dir():
        found.append(("model", str(run / "model")))
    answers: list[dict[str, Any]] = (read_json(run / "generations.json") or {}).get("answers", [])
    if answers:
        found.append(("sample", f"{answers[0]['prompt']}\n{answers[0]['answer']}"))
    return found


def _console() -> Any:
    """Where there is no terminal to fit into, lines are long rather than folded: people grep them."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=240)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
