"""RUN/report.html: the curves of a training as one page that needs no other file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Config
from jobs.report.charts import Curve, of_curves
from jobs.report.pages import filled

PHASES = ("data_s", "forward_s", "backward_s", "optimizer_s")
Line = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One chart with what it shows and, in words, its newest value."""

    title: str
    about: str
    newest: str
    curve: Curve


def html(config: Config, path: Path, steps: int, warnings: list[str]) -> str:
    """The page of the metrics.jsonl at `path`; `steps` are those that training is going to have."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    trained = [line for line in lines if "loss" in line]
    return filled(
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
    """What one wants to know at a glance."""
    if not trained:
        return [("step", f"0 of {steps:,}")]
    last = trained[-1]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    found = [("step", f"{last['step']:,} of {steps:,}"), ("loss", f"{last['loss']:.4f}")]
    found += [("held-out loss", f"{held_out[-1]:.4f}")] if held_out else []
    found.append(("tokens/s a rank", f"{_middle(trained, 'tokens_per_s_per_rank'):,.0f}"))
    if "mfu" in last:
        found.append(("FLOP utilisation", f"{_middle(trained, 'mfu'):.1%}"))
    if left := next((line["left_s"] for line in reversed(trained) if "left_s" in line), 0):
        found.append(("left", clock(left)))
    return found


def _middle(lines: list[Line], name: str) -> float:
    values = sorted(line.get(name, 0.0) for line in lines)
    return float(values[len(values) // 2])


def _panels(lines: list[Line], trained: list[Line]) -> list[Panel]:
    loss, held_out = _points(trained, "loss"), _points(lines, "eval_loss")
    shown = [
        ("Loss", "mean over the trained tokens of a step, and dots on held-out rows", [loss], held_out, "{:.4f}"),
        ("Gradient norm", "before clipping", [_points(trained, "grad_norm")], [], "{:.3g}"),
        ("Learning rate", "", [_points(trained, "learning_rate")], [], "{:.2e}"),
        ("Tokens/s a rank", "without padding", [_points(trained, "tokens_per_s_per_rank")], [], "{:,.0f}"),
        ("FLOP utilisation", "of the GPU's dense bf16 peak", [_points(trained, "mfu")], [], "{:.1%}"),
        ("Peak memory, GiB", "the rank with least and the one with most", [
            _points(trained, "memory_gib_min"), _points(trained, "memory_gib_max")], [], "{:.1f}"),
    ]  # fmt: skip
    return [
        Panel(title, about, form.format(series[-1][-1][1]), of_curves(series, dots))
        for title, about, series, dots, form in shown
        if series[-1]
    ]


def _points(lines: list[Line], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]


def _phases(trained: list[Line]) -> list[tuple[str, float, float]]:
    """(phase, seconds, percent of them all) of the newest step that was timed."""
    last: Line = next((line for line in reversed(trained) if "forward_s" in line), {})
    whole = math.fsum(last.get(name, 0.0) for name in PHASES)
    return [(name.removesuffix("_s"), last[name], 100 * last[name] / whole) for name in PHASES] if whole else []


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
