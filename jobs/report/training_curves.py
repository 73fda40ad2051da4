"""Renders RUN/report.html: the curves of a training run on one page that needs no other file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.report.charts import Curve, line_chart
from jobs.report.pages import render_page

PHASES = ("data_s", "forward_s", "backward_s", "optimizer_s")
Line = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True)
class Panel:
    """One chart with its title, what it shows, and its newest value as text."""

    title: str
    description: str
    newest: str
    curve: Curve


def render_html(config: Config, path: Path, steps: int, warnings: list[str]) -> str:
    """The page for the metrics.jsonl at `path`. steps: how many steps the whole training has."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    trained = [line for line in lines if "loss" in line]
    return render_page(
        "training.html.j2",
        name=config.name,
        run_dir=config.run_dir,
        facts=_facts(lines, trained, steps),
        panels=_panels(lines, trained),
        phases=_phases(trained),
        memory=next((line for line in reversed(trained) if "memory_gib_max" in line), None),
        warnings=warnings,
    )


def _facts(lines: list[Line], trained: list[Line], steps: int) -> list[tuple[str, str]]:
    """The figures at the top of the page, as (title, value)."""
    if not trained:
        return [("step", f"0 of {steps:,}")]
    last = trained[-1]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    facts = [("step", f"{last['step']:,} of {steps:,}"), ("loss", f"{last['loss']:.4f}")]
    facts += [("held-out loss", f"{held_out[-1]:.4f}")] if held_out else []
    facts.append(("tokens/s per rank", f"{_median(trained, 'tokens_per_s_per_rank'):,.0f}"))
    if "mfu" in last:
        facts.append(("FLOP utilization (MFU)", f"{_median(trained, 'mfu'):.1%}"))
    if left := next((line["left_s"] for line in reversed(trained) if "left_s" in line), 0):
        facts.append(("time left", clock(left)))
    return facts


def _median(lines: list[Line], name: str) -> float:
    values = sorted(line.get(name, 0.0) for line in lines)
    return float(values[len(values) // 2])


def _panels(lines: list[Line], trained: list[Line]) -> list[Panel]:
    loss, held_out = _points(trained, "loss"), _points(lines, "eval_loss")
    loss_description = "line: mean over the trained tokens of a step" + ("; dots: held-out rows" if held_out else "")
    charts = [
        ("Loss", loss_description, [loss], held_out, "{:.4f}"),
        ("Gradient norm", "before clipping", [_points(trained, "grad_norm")], [], "{:.3g}"),
        ("Learning rate", "", [_points(trained, "learning_rate")], [], "{:.2e}"),
        ("Tokens/s per rank", "without padding", [_points(trained, "tokens_per_s_per_rank")], [], "{:,.0f}"),
        ("FLOP utilization (MFU)", "share of the GPU's dense bf16 peak", [_points(trained, "mfu")], [], "{:.1%}"),
        ("Peak memory (GiB)", "of the ranks with the least and the most", [
            _points(trained, "memory_gib_min"), _points(trained, "memory_gib_max")], [], "{:.1f}"),
    ]  # fmt: skip
    return [
        Panel(title, description, format_.format(series[-1][-1][1]), line_chart(series, dots))
        for title, description, series, dots, format_ in charts
        if series[-1]
    ]


def _points(lines: list[Line], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, without infinite and NaN values."""
    return [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]


def _phases(trained: list[Line]) -> list[tuple[str, float, float]]:
    """(phase, seconds, percent of all phases) of the newest step that was timed."""
    last: Line = next((line for line in reversed(trained) if "forward_s" in line), {})
    total = math.fsum(last.get(name, 0.0) for name in PHASES)
    return [(name.removesuffix("_s"), last[name], 100 * last[name] / total) for name in PHASES] if total else []


def clock(seconds: float) -> str:
    """Seconds as `hours:minutes:seconds`, e.g. 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
