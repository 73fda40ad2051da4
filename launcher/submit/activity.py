"""What the running job of a local run is doing: its phase, its progress bar, or the step of training, as one line of text."""

import re
import time
from datetime import timedelta
from pathlib import Path

from launcher.run_folder import attempts
from launcher.status import progress

BAR = re.compile(r"^(?P<name>[\w .-]+?):\s+(?P<percent>\d+)%\|[^|]*\|\s*(?P<rest>.*)$")
"""A bar of tqdm, in a log: `weights:  40%|####      | 6.4G/16.1G [00:05<00:07, 1.3GB/s]`."""
STEP = re.compile(r"^step +\d+/(\d+) ")
LOOK_EVERY_S = 1.0
PHASES = {"start": "starting", "load": "loading", "evaluate": "evaluating", "save": "saving", "finish": "ending"}


class Activity:
    """One job that runs. `attempt` is the folder of its attempt."""

    def __init__(self, run: Path, job: str, attempt: Path, steps: int | None, memory_gib: float | None) -> None:
        self.job, self.steps = job, steps
        self.started = time.monotonic()
        self.share: float | None = None
        """How much is done, from 0 to 1; None if that is not known."""
        self._run, self._attempt, self._memory_gib = run, attempt, memory_gib
        self._bar, self._training, self._phase = "", "", ""
        self._ends_at: float | None = None
        self._memory = ""
        self._looked_at = -LOOK_EVERY_S

    def read(self, line: str) -> bool:
        """Take what a line of the log says. Returns whether the line is a progress bar, which is shown in another way."""
        if found := STEP.match(line):
            self.steps = int(found[1])
        bar = BAR.match(line)
        if bar:
            done = int(bar["percent"])
            self.share, self._bar = done / 100, f"{bar['name']} {done} % {bar['rest']}" if done < 100 else ""
        return bar is not None

    def look(self) -> None:
        """Read the newest step and phase from the run folder, at most once in LOOK_EVERY_S seconds."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        beats = attempts.published_ranks(self._attempt).values()
        self._phase = next((PHASES.get(beat["phase"], "") for beat in beats), "")
        if self.job == "train":
            self._look_at_training()

    def _look_at_training(self) -> None:
        last = progress.newest_line(self._run)
        if last.get("time", 0) < time.time() - (time.monotonic() - self.started):  # of an earlier attempt
            return
        step, now = last["step"], time.monotonic()
        if last.get("left_s") is not None:
            self._ends_at = now + last["left_s"]
        if (memory := last.get("memory_gib_max")) is not None:
            of = f" of {self._memory_gib:g}" if self._memory_gib else ""
            self._memory = f"  memory {memory:.1f}{of} GiB"
        self.share = step / self.steps if self.steps else None
        left = f"  left {timedelta(seconds=round(max(0, self._ends_at - now)))}" if self._ends_at else ""
        steps = f"step {step:,} of {self.steps:,}" if self.steps else f"step {step:,}"
        self._training = (
            f"{steps}  loss {last['loss']:.4f}  {last.get('tokens_per_s', 0):,.0f} tokens/s{left}{self._memory}"
        )
        self._bar = ""

    def __str__(self) -> str:
        words = [self._bar or self._training, self._phase if not self._bar else ""]
        return "  ".join(filter(None, words)) or "starting"

    @property
    def elapsed(self) -> str:
        """How long the job has run."""
        return str(timedelta(seconds=round(time.monotonic() - self.started)))
