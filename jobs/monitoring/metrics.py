"""What a run reports while it trains: metrics.jsonl with every step, log lines, a page, and a tracker where one is named."""

import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from conf.choices import Tracker
from conf.files import read_json, write_json, write_text
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.report import training_curves

log = logging.getLogger(__name__)

DRAW_S = 30.0
"""Seconds between two drawings of the page at least, and a hundred times as long as drawing took: ranks wait for it."""


class Metrics:
    """Rank 0's record; on other ranks every call does nothing. Continues the file of a resumed run after `step`."""

    def __init__(self, config: Config, world: World, steps: int, step: int) -> None:
        self.config, self.steps, self.is_main, self.started, self.first = (
            config,
            steps,
            world.is_main,
            time.monotonic(),
            step,
        )
        self.path = Path(config.run_dir) / "metrics.jsonl"
        self.tracker = None
        self.evaluated: set[int] = set()
        """Steps whose held-out loss is on record already; known to rank 0."""
        self.losses: list[float] = []
        """Of the steps before the one that is resumed from; known to rank 0."""
        self.warnings: list[str] = []
        """Of this attempt."""
        self._next: dict[str, float] = {}
        self._draw_at = time.monotonic() + DRAW_S
        if self.is_main:
            kept = _truncate(self.path, step)
            self.evaluated = {int(line["step"]) for line in kept if "eval_loss" in line}
            self.losses = [float(line["loss"]) for line in kept if "loss" in line]
            self.file = self.path.open("a", encoding="utf-8")
            self.tracker = _tracker(config, step)

    def write(self, step: int, **values: Any) -> None:
        """Append one line, whole: a killed job leaves no half of it."""
        if not self.is_main:
            return
        values |= self._next
        self._next = {}
        self.file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log(values, step=step)

    def show(self, step: int, /, **values: Any) -> None:
        """A line for the log, with the time that is left; now and then also the page."""
        if self.is_main:
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            left = training_curves.clock(self.left(step))
            log.info(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}  left {left}")
            if time.monotonic() >= self._draw_at:
                self.draw()

    def left(self, step: int) -> float:
        """Seconds until the last step, at the rate of this attempt with all its evaluations and checkpoints."""
        return (self.steps - step) * (time.monotonic() - self.started) / max(1, step - self.first)

    def note(self, **values: float) -> None:
        """Numbers that go into the next line that is written."""
        self._next |= values

    def say(self, lines: list[str]) -> None:
        """Lines for the log as they are."""
        if self.is_main:
            log.info("\n".join(lines))

    def warn(self, step: int, texts: list[str]) -> None:
        """Say what is odd in the log, and on the page."""
        if self.is_main:
            for text in texts:
                log.warning(f"step {step}: {text}")
            self.warnings += [f"step {step}: {text}" for text in texts]

    def draw(self) -> None:
        """Write RUN/report.html from all that has been written so far. A page that cannot be written ends no training."""
        if not self.is_main:
            return
        began = time.monotonic()
        try:
            page = training_curves.html(self.config, self.path, self.steps, self.warnings)
            write_text(self.path.with_name("report.html"), page)
        except OSError as error:
            log.warning(f"report.html: {error}")
        self._draw_at = time.monotonic() + max(DRAW_S, 100 * (time.monotonic() - began))

    def close(self) -> None:
        self.draw()
        if self.is_main:
            self.file.close()
            if self.tracker:
                self.tracker.finish()


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what a killed attempt wrote after the checkpoint it is resumed from, and any torn last line; what is kept."""
    if not path.exists():
        return []
    kept, lines = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
            if found["step"] <= step and step:
                kept.append(found)
                lines.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(lines))
    return kept


def _tracker_id(config: Config) -> str:
    """One id for all attempts of a run, kept in its folder; a run folder's name alone may be that of another project's run."""
    path = Path(config.run_dir) / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    return str(read_json(path)["id"])


def _tracker(config: Config, step: int) -> Any:
    if config.tracker is Tracker.none:
        return None
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if config.tracker is Tracker.tensorboard:
        tracker = TensorBoardTracker(config.name, logging_dir=config.run_dir, purge_step=step + 1 if step else None)
    else:
        name = Path(config.run_dir).name
        tracker = WandBTracker(config.name, id=_tracker_id(config), name=name, resume="allow", dir=config.run_dir)
    tracker.start()
    return tracker
