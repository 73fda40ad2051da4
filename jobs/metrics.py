"""What a run reports while it trains: metrics.jsonl with every step, lines for the log, and a tracker where one is named."""

import json
import time
import uuid
from pathlib import Path
from typing import Any

from conf.files import read_json, write_json, write_text
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
        self.evaluated: set[int] = set()
        """Steps whose held-out loss is on record already; known to rank 0."""
        if self.is_main:
            kept = _truncate(self.path, step)
            self.evaluated = {int(line["step"]) for line in kept if "eval_loss" in line}
            self.file = self.path.open("a", encoding="utf-8")
            self.tracker = _tracker(config, step)

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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
