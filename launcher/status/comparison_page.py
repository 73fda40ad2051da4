"""Renders compare.html: the table of the runs, their curves, and the keys that differ."""

import time
from collections.abc import Sequence

from launcher.status.comparison import ComparedRun, caution, differing_keys
from launcher.status.comparison_table import Table
from pages.curves import Chart, Series, drawn, points
from pages.render import render_page

ALL_POINTS = 8000
"""Points of a chart, divided among its runs, so that the page stays below 1 MB."""
SMOOTHING = 0.8
REFRESH_S = 30
"""How often the page loads itself again while a run trains, and `muster compare --watch` writes it again."""
CURVES = (
    ("Training loss", "nats per token", "loss", "plain"),
    ("Held-out loss", "nats per token", "eval_loss", "plain"),
    ("Learning rate", "learning rate", "learning_rate", "small"),
    ("Speed", "tokens/s, all ranks", "tokens_per_s", "count"),
)
"""Title, axis, name in metrics.jsonl, and how numbers are written."""


def render_html(runs: Sequence[ComparedRun], results: Table, cost: float | None) -> str:
    """The page: one file that needs no other. results: what `table` has returned."""
    keys = differing_keys(runs)
    charts = drawn(_chart(runs, *curve) for curve in CURVES)
    most = max(50, min(600, ALL_POINTS // len(runs)))
    return render_page(
        "compare.html.j2",
        runs=[{"name": run.name, "folder": str(run.folder), "every": run.every} for run in runs],
        table=results,
        keys=keys,
        caution=caution(keys),
        cost=cost,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        charts=charts,
        data={
            "charts": [chart.as_json(most) for chart in charts],
            "smoothing": SMOOTHING,
            "raw": False,
            "shared": True,
            "refresh_s": REFRESH_S if any(run.is_open for run in runs) else 0,
            "written": round(time.time()),
            "silence": "Type muster compare again, with --watch to keep it up to date.",
        },
    )


def _chart(runs: Sequence[ComparedRun], title: str, axis: str, name: str, number: str) -> Chart:
    smooth, dots = name in ("loss", "tokens_per_s"), name == "eval_loss"
    series = [Series(run.name, points(run.lines, name), index, dots, smooth) for index, run in enumerate(runs)]
    return Chart(title, axis, series, number, note="smoothed by the slider" if smooth else "")
