"""The table of a comparison of runs: one row per run, with its results and the first keys that differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.status.comparison import ComparedRun, best_run, caution, differing_keys

KEY_COLUMNS = 6
"""Most differing keys that the table shows; the page lists all of them."""
VALUE_LENGTH = 40
"""Most characters of a value in the table; the page has the whole value in its list of keys."""


@dataclass(frozen=True)
class Table:
    """One row per run."""

    headings: list[str]
    rows: list[list[str]]
    key_column: int
    """The first column with a key; such values may be long."""
    best: int | None
    """The row with the lowest held-out loss."""
    notes: list[str]


def table(runs: Sequence[ComparedRun], cost: float | None) -> Table:
    """The results, and the first keys that differ. cost: of a GPU-hour; None leaves it out."""
    keys = differing_keys(runs)
    some = list(keys)[:KEY_COLUMNS]
    uses_gpus = any(run.gpu_hours is not None for run in runs)
    headings = ["run", "best held-out loss", "at step", "training loss", "step", "tokens/s"]
    headings += ["GPU-hours"] * uses_gpus + ["cost"] * (uses_gpus and cost is not None) + ["state", *some]
    rows = []
    for index, run in enumerate(runs):
        best, hours = run.best, run.gpu_hours
        row = [
            run.name,
            _text(best and best[1], ".4f"),
            _text(best and best[0], ","),
            _text(run.last and run.last[1], ".4f"),
        ]
        row += [_text(run.last and run.last[0], ",") + (f"/{run.steps:,}" if run.steps and run.last else "")]
        row += [_text(run.tokens_per_s, ",.0f")]
        row += [_text(hours, ".3g")] * uses_gpus
        if uses_gpus and cost is not None:
            row.append(_text(None if hours is None else hours * cost, ",.2f"))
        rows.append([*row, run.status, *(_shortened(keys[key][index]) for key in some)])
    winner = best_run(runs)
    more = len(keys) - len(some)
    notes = [
        caution(keys),
        "no run has used GPUs, so there are no GPU-hours and no cost" if cost is not None and not uses_gpus else "",
        f"{more} more keys differ; the page lists them" if more else "",
    ]
    return Table(
        headings,
        rows,
        len(headings) - len(some),
        None if winner is None else list(runs).index(winner),
        [text for text in notes if text],
    )


def _shortened(value: str) -> str:
    """A value that fits into a column."""
    return value if len(value) <= VALUE_LENGTH else value[: VALUE_LENGTH - 3] + "..."


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
