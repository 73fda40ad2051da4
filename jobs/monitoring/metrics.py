"""Reports a training from rank 0: every step to metrics.jsonl, log lines, report.html, and the tracker (`trackers.py`)."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from conf.files import write_json, write_text
from conf.schema import Config
from jobs.distributed.process_group import World
from jobs.monitoring.trackers import Trackers
from pages.curves import clock
from pages.report import Progress, hardware, render_html

log = logging.getLogger(__name__)

REPORT_EVERY_S = 30.0
"""Minimum seconds between two writes of report.html. At least 100 times the seconds that the last write took, because all
ranks wait for it."""


class Metrics:
    """Reports from rank 0; on other ranks every call does nothing. A resumed run continues the files after step `first_step`."""

    def __init__(self, config: Config, world: World, *, last_step: int, first_step: int) -> None:
        self.config, self.last_step, self.first_step = config, last_step, first_step
        self.is_main, self.ranks = world.is_main, world.size
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPUs"
        self.hardware = hardware(world.size // world.local_size, world.size, device)
        self.path = Path(config.run_dir) / "metrics.jsonl"
        self.held_out_losses: dict[int, float] = {}
        """The `eval_loss` of steps up to the checkpoint that this attempt resumes from. Only rank 0 knows them."""
        self.earlier_losses: list[float] = []
        """Losses of all steps up to the checkpoint that this attempt resumes from. Only rank 0 knows them."""
        self.warnings: list[str] = []
        """Warnings of this attempt."""
        self._started = time.monotonic()
        self._for_next_line: dict[str, float] = {}
        self._report_at = time.monotonic() + REPORT_EVERY_S
        if self.is_main:
            kept = _truncate(self.path, first_step)
            self.held_out_losses = {int(line["step"]): float(line["eval_loss"]) for line in kept if "eval_loss" in line}
            self.earlier_losses = [float(line["loss"]) for line in kept if "loss" in line]
            self.file = self.path.open("a", encoding="utf-8")
            self.trackers = Trackers(config, first_step)

    def write(self, step: int, **values: Any) -> None:
        """Append one line to metrics.jsonl and flush it, so that a killed job does not leave half a line."""
        if not self.is_main:
            return
        values |= self._for_next_line
        self._for_next_line = {}
        self.file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        self.trackers.log(values, step)

    def add_to_next_line(self, **values: float) -> None:
        """Add numbers to the next line of metrics.jsonl."""
        self._for_next_line |= values

    def log_step(self, step: int, /, **fields: Any) -> None:
        """Log one line for a step, with the remaining time. Also rewrites report.html when that is due."""
        if self.is_main:
            text = "  ".join(f"{name} {value}" for name, value in fields.items())
            left = clock(self.seconds_left(step))
            log.info(f"step {step:>{len(str(self.last_step))}}/{self.last_step}  {text}  left {left}")
            if time.monotonic() >= self._report_at:
                self.write_report()

    def seconds_left(self, step: int) -> float:
        """Seconds until the last step, at the speed of this attempt including its evaluations and checkpoints."""
        elapsed = time.monotonic() - self._started
        return (self.last_step - step) * elapsed / max(1, step - self.first_step)

    def log_lines(self, lines: list[str]) -> None:
        """Log lines from rank 0."""
        if self.is_main:
            log.info("\n".join(lines))

    def warn(self, step: int, messages: list[str]) -> None:
        """Log warnings, and keep them for report.html."""
        if self.is_main:
            for message in messages:
                log.warning(f"step {step}: {message}")
            self.warnings += [f"step {step}: {message}" for message in messages]

    def write_report(self, state: str = "training") -> None:
        """Write RUN/report.html from metrics.jsonl. If that fails, log a warning: it is no reason to end a training.

        state: training, completed, stopped or failed.
        """
        if not self.is_main:
            return
        began = time.monotonic()
        try:
            progress = Progress(state, self.last_step, self.ranks, self.hardware, self.warnings)
            page = render_html(self.config, self.path, progress)
            write_text(self.path.with_name("report.html"), page)
            # for the launcher, which writes the page again if this training is killed
            write_json(self.path.with_name("report.json"), asdict(progress))
        except Exception as error:  # whatever it is, a page is not worth a training
            log.warning(f"report.html: cannot be written ({type(error).__name__}: {error}); training continues")
        took_s = time.monotonic() - began
        self._report_at = time.monotonic() + max(REPORT_EVERY_S, 100 * took_s)

    def close(self, state: str = "completed") -> None:
        """Write the last report, with how the training has ended, and close metrics.jsonl and the tracker."""
        self.write_report(state)
        if self.is_main:
            self.file.close()
            self.trackers.finish()


def _truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after `step`, which a killed attempt wrote after its last checkpoint, and a torn last line.

    Returns the lines that are kept. `step` 0 is a new start and keeps none.
    """
    if not path.exists():
        return []
    kept, lines = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if values["step"] <= step and step:
                kept.append(values)
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # or what somebody else has written
            continue
    write_text(path, "".join(lines))
    return kept
