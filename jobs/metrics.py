"""What a run reports while it trains: metrics.jsonl with every step, lines for the log, and a tracker where one is named."""

import json
import time
from pathlib import Path
from typing import Any

from conf.files import write_text
from conf.schema import Config, Tracker
from jobs.distributed import World


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
        if self.is_main:
            _truncate(self.path, step)
            self.file = self.path.open("a", encoding="utf-8")
            self.tracker = _tracker(config)

    def write(self, step: int, **values: Any) -> None:
        """Append one line, whole: a killed job leaves no half of it."""
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
        self.file.flush()
        if self.tracker:
            self.tracker.log(values, step=step)

    def show(self, step: int, **values: Any) -> None:
        """A line for the log, with the time that is left."""
        if self.is_main:
            rate = (step - self.first) / max(1e-9, time.monotonic() - self.started)
            left = (self.steps - step) / rate if rate else 0.0
            text = "  ".join(f"{name} {value}" for name, value in values.items())
            print(f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}  left {_clock(left)}", flush=True)

    def close(self) -> None:
        if self.is_main:
            self.file.close()
            if self.tracker:
                self.tracker.finish()


def _truncate(path: Path, step: int) -> None:
    """Drop what a killed attempt wrote after the checkpoint it is resumed from, and any torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step and step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))


def _tracker(config: Config) -> Any:
    if config.tracker is Tracker.none:
        return None
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if config.tracker is Tracker.tensorboard:
        tracker = TensorBoardTracker(config.name, logging_dir=config.run_dir)
    else:
        name = Path(config.run_dir).name
        tracker = WandBTracker(
            config.name, id=name, resume="allow", dir=config.run_dir
        )  # one id: a resumed run is one curve
    tracker.start()
    return tracker


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
