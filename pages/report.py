"""Renders RUN/report.html: the state, curves, attempts and settings of a training, on one page that needs no other file."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.plural import plural
from conf.schema import Config
from pages import attempts, run_facts
from pages.curves import Chart, Line, Series, clock, drawn, median, points
from pages.render import render_page
from pages.run_facts import Fact, moment

PHASES = ("data_s", "forward_s", "backward_s", "optimizer_s")
REFRESH_S = 30
"""How often the page loads itself again while the run trains."""
SMOOTHING = 0.6
"""Where the slider begins, as in W&B's and TensorBoard's."""
LOOKS = {"completed": "good", "preempted": "warn", "time_limit": "warn", "stopped": "warn", "training": "now"}
"""Colors of attempts; others have failed."""


@dataclass(frozen=True)
class Progress:
    """What the page must know of the training beside its files."""

    state: str
    """training, completed, stopped or failed, or the status of a verdict."""
    steps: int
    """How many steps the whole training has."""
    ranks: int
    hardware: str
    """The devices, in words."""
    warnings: list[str]
    ended: float | None = None
    """When the training ended, if this page is written later."""
    reason: str = ""
    """How it ended, and what comes next."""
    goes_on: bool = False
    """Whether Slurm starts it again by itself."""


def render_html(config: Config, path: Path, progress: Progress) -> str:
    """The page for the metrics.jsonl at `path`."""
    now = progress.ended or time.time()
    is_live = progress.state == "training" or progress.goes_on
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    trained = [line for line in lines if "loss" in line]
    charts = drawn(_charts(lines, trained))
    last_step = trained[-1]["step"] if trained else None
    found = attempts.read(Path(config.run_dir))
    started = found[0].started if found else lines[0]["time"] if lines else now
    of_run = [*run_facts.model(config), run_facts.data(config), ("hardware", progress.hardware)]
    return render_page(
        "report.html.j2",
        name=config.name,
        run_dir=config.run_dir,
        about=[text for _, text in (of_run[0], *of_run[-2:])],
        state=progress.state,
        look={"training": "", "completed": "good"}.get(progress.state, LOOKS.get(progress.state, "stop")),
        written=moment(time.time()),
        until=moment(now),
        links=_links(config),
        facts=[*_facts(lines, trained, progress.steps), *_times(started, trained, progress.state, now)],
        warnings=[*([progress.reason] if progress.reason else []), *progress.warnings],
        charts=charts,
        phases=_phases(trained),
        attempts=[_span(one, found, progress, last_step, now) for one in found],
        settings=[*of_run, *run_facts.settings(config, progress.ranks, progress.steps)],
        config_text=run_facts.config_text(config),
        data={
            "charts": [chart.as_json() for chart in charts],
            "smoothing": SMOOTHING,
            "raw": True,
            "shared": False,
            "refresh_s": REFRESH_S if is_live else 0,
            "written": round(time.time()),
            "silence": "The training may have ended: muster status shows its state.",
        },
    )


def _links(config: Config) -> list[tuple[str, str]]:
    """(text, address) of the run's other pages. That of the answers is written after this one."""
    has_preview = (Path(config.run_dir) / "data/preview.html").exists()
    links = [("training data (preview.html)", "data/preview.html")] * has_preview
    if "generate" in config.jobs:
        links.append(("answers (generations.html, after the job generate)", "generations.html"))
    return links


def _facts(lines: list[Line], trained: list[Line], steps: int) -> list[Fact]:
    """The figures at the top of the page."""
    if not trained:
        return [("step", f"0 of {steps:,}")]
    last = trained[-1]
    held_out = [(line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line]
    facts = [("step", f"{last['step']:,} of {steps:,}"), ("training loss", f"{last['loss']:.4f}")]
    if held_out:
        best, step = min(held_out)
        facts += [("held-out loss", f"{held_out[-1][0]:.4f}"), ("best held-out loss", f"{best:.4f} at {step:,}")]
    facts.append(("learning rate", f"{last['learning_rate']:.2e}"))
    rates = [("tokens/s, all ranks", "tokens_per_s"), ("tokens/s per rank", "tokens_per_s_per_rank")]
    facts += [(title, f"{rate:,.0f}") for title, name in rates if (rate := median(trained, name)) is not None]
    if (mfu := median(trained, "mfu")) is not None:
        facts.append(("FLOP utilization (MFU)", f"{mfu:.1%}"))
    return facts


def _times(started: float, trained: list[Line], state: str, now: float) -> list[Fact]:
    """When the training began, and how long it takes."""
    facts = [("started", moment(started)), ("elapsed", clock(max(0.0, now - started)))]
    left_s = next((line["left_s"] for line in reversed(trained) if "left_s" in line), None)
    if state == "training" and left_s is not None:
        facts += [("time left", clock(left_s)), ("ends about", moment(now + left_s))]
    return facts


def _charts(lines: list[Line], trained: list[Line]) -> list[Chart]:
    def curve(name: str, label: str, look: int = 0) -> Series:
        return Series(label, points(trained, name), look, smooth=True)

    held_out = Series("held-out", points(lines, "eval_loss"), 1, dots=True)
    rate = Series("learning rate", points(trained, "learning_rate"))
    memory = [
        Series("rank with the most", points(trained, "memory_gib_max"), 0),
        Series("rank with the least", points(trained, "memory_gib_min"), 8),
    ]
    of_tokens = "mean over the trained tokens of a step" + (
        "; held-out: over all held-out rows" * bool(held_out.points)
    )
    return [
        Chart("Loss", "nats per token", [curve("loss", "training"), held_out], note=of_tokens),
        Chart("Gradient norm", "norm", [curve("grad_norm", "gradient norm", 3)], note="before clipping"),
        Chart("Learning rate", "learning rate", [rate], "small"),
        Chart(
            "Speed", "tokens/s per rank", [curve("tokens_per_s_per_rank", "tokens/s", 2)], "count", "without padding"
        ),
        Chart("FLOP utilization (MFU)", "% of peak", [curve("mfu", "MFU", 4)], "share", "of the dense bf16 peak"),
        Chart("Peak memory", "GiB", memory, note="since the start of the attempt"),
    ]


def _phases(trained: list[Line]) -> list[tuple[str, float, float]]:
    """(phase, seconds, percent of all phases) of the newest step that was timed."""
    last: Line = next((line for line in reversed(trained) if "forward_s" in line), {})
    total = math.fsum(last.get(name, 0.0) for name in PHASES)
    return [(name.removesuffix("_s"), last[name], 100 * last[name] / total) for name in PHASES] if total else []


def _span(
    one: attempts.Attempt, found: list[attempts.Attempt], progress: Progress, last_step: int | None, now: float
) -> dict[str, Any]:
    """One row of the timeline. Positions are in percent of the time since the first attempt began.

    The verdict on the newest attempt is written after this page, or never: until then, `progress` and `last_step` are its.
    """
    is_newest = one is found[-1]
    status = one.status or (progress.state if is_newest else "no verdict")
    step = last_step if is_newest and one.step is None else one.step
    follower = now if is_newest else found[found.index(one) + 1].started
    ended = one.ended or follower
    begin, length = found[0].started, max(1e-9, now - found[0].started)
    left = min(100.0, max(0.0, 100 * (one.started - begin) / length))
    return {
        "number": one.number,
        "began": moment(one.started),
        "took": clock(max(0.0, ended - one.started)),
        "left": left,
        "width": min(100 - left, max(0.7, 100 * (ended - one.started) / length)),
        "status": status,
        "look": LOOKS.get(status, "stop"),
        "resumed": "" if one.resumed is None else f"{one.resumed:,}",
        "step": "" if step is None else f"{step:,}",
        "host": one.host,
        "reason": one.reason or (progress.reason if is_newest else ""),
    }


def hardware(nodes: int, ranks: int, device: str) -> str:
    """The devices of a training in words: `2 nodes, 16 ranks on NVIDIA H200`."""
    return f"{plural(nodes, 'node')}, {plural(ranks, 'rank')} on {device}"
