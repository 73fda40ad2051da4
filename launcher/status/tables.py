"""Prints tables about runs: a list of them, and the result of one at its end."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from conf.files import read_json
from conf.visible import visible
from launcher.run_folder.attempts import metrics
from launcher.status import terminal
from launcher.status.comparison_table import Table as ComparisonTable
from launcher.status.listing import Summary

STATE = "state"
"""The heading of a column whose cells are colored."""


def runs(found: Sequence[Summary], folder: Path) -> None:
    """Print one row per run: its name below `folder`, state, step, loss, time left, GPU-hours if one used GPUs, and age."""
    uses_gpus = any(item.gpu_hours for item in found)
    rows = []
    for item in found:
        step = "" if item.step is None else f"{item.step}/{item.steps}" if item.steps else str(item.step)
        cells = (
            str(item.run.relative_to(folder)) if item.run != folder else item.run.name,
            item.state,
            step,
            "" if item.loss is None else f"{item.loss:.4f}",
            duration(item.left_s),
            *([f"{item.gpu_hours:.1f}" if item.gpu_hours is not None else ""] if uses_gpus else []),
            "" if item.launched is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(item.launched)),
        )
        rows.append(cells)
    print_rows(("run", STATE, "step", "loss", "left", *["GPU-hours"] * uses_gpus, "launched"), rows)


def comparison(found: ComparisonTable) -> None:
    """Print one row per run that is compared, the best in bold, and what to keep in mind."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in found.headings:
        table.add_column(cell(heading), overflow="fold")
    for number, cells in enumerate(found.rows):
        table.add_row(*map(cell, cells), style="bold" if number == found.best else None)
    terminal.console().print(table)
    for note in found.notes:
        print(visible(f"note: {note}"))


def print_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. On a terminal rich folds its cells; elsewhere a row is one line, which takes a tenth of the time."""
    if sys.stdout.isatty():
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            looks = [
                terminal.style(text) if heading == STATE else "" for heading, text in zip(headings, row, strict=True)
            ]
            table.add_row(*map(cell, row, looks))
        terminal.console().print(table)
        return
    lines = [headings, *([visible(text).replace("\n", " ") for text in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def duration(seconds: float | None) -> str:
    """Return seconds as h:mm:ss; empty for None."""
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def show_result(run: Path) -> None:
    """Print the result of a run: losses, speed, sizes, the folder of the model, and a sample of its answers."""
    from rich.table import Table

    table = Table(title=cell(run.name), title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in result_rows(run):
        table.add_row(cell(name), cell(value))
    terminal.console().print("", table)


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


def cell(text: str, style: str = "") -> Any:
    """Return a cell with exactly this text: rich would take the brackets in a plain string for markup."""
    from rich.text import Text

    return Text(visible(text), style=style)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
