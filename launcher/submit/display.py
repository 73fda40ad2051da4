"""Shows a local run: one block that changes, below the log, on a terminal; elsewhere lines with the time and nothing else."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from launcher.status import terminal
from launcher.submit.activity import Activity
from launcher.submit.interrupts import Interrupts

SILENT_S = 15.0
"""After so long without a line, a plain display says what the job is doing."""
BAR_WIDTH = 24


def is_lively(stream: Any) -> bool:
    """Whether a stream is a terminal whose lines can be written over, in colors."""
    return bool(stream.isatty()) and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")


def of(jobs: Sequence[str], requests: Interrupts) -> "Plain":
    """The display for standard output."""
    return Live(jobs, requests) if is_lively(sys.stdout) else Plain(requests)


class Plain:
    """Lines with the time. Says what the job is doing after SILENT_S seconds without one."""

    def __init__(self, requests: Interrupts) -> None:
        self.activity: Activity | None = None
        self._requests = requests
        self._spoke_at = time.monotonic()

    def begin(self, activity: Activity) -> None:
        """A job starts."""
        self.activity = activity
        self._say(f"\n==== {activity.job}")

    def line(self, text: str) -> None:
        """A line of the job's log."""
        if self.activity and self.activity.read(text):
            return
        self._say(f"{time.strftime('%H:%M:%S')} {text}" if text else "")

    def note(self, text: str, style: str = "") -> None:
        """A message of the launch itself. `style` is a color, if there are any."""
        self._requests.say(text, sys.stderr)

    def tick(self) -> None:
        """Called several times in a second while a job runs."""
        if self.activity and time.monotonic() - self._spoke_at > SILENT_S:
            self.activity.look()
            self.line(f"{self.activity.job:<9} {self.activity}, {self.activity.elapsed}")

    def end(self, status: str) -> None:
        """The job has ended."""

    def close(self) -> None:
        """The run has ended."""

    def _say(self, text: str) -> None:
        self._spoke_at = time.monotonic()
        self._requests.say(text, sys.stdout)


class Live(Plain):
    """The log, and below it a block with the states of all jobs and the progress of the one that runs."""

    def __init__(self, jobs: Sequence[str], requests: Interrupts) -> None:
        from rich.console import Console
        from rich.live import Live as Block

        super().__init__(requests)
        self._states = dict.fromkeys(jobs, "waiting")
        self._console = Console()
        # refreshed by `tick`: a thread could not stop where the terminal is gone
        self._block = Block(console=self._console, auto_refresh=False)
        self._block.start()

    def begin(self, activity: Activity) -> None:
        super().begin(activity)
        self._states[activity.job] = "running"

    def note(self, text: str, style: str = "") -> None:
        self._print(text, style)

    def tick(self) -> None:
        if self.activity:
            self.activity.look()
        with self._requests.writing(sys.stdout):
            self._block.update(self._picture(), refresh=True)

    def end(self, status: str) -> None:
        if self.activity:
            self._states[self.activity.job] = f"{status} {self.activity.elapsed}"
        self.activity = None
        self.tick()

    def close(self) -> None:
        with self._requests.writing(sys.stdout):
            self._block.stop()

    def _say(self, text: str) -> None:
        self._print(text, "bold" if text.startswith("\n====") else "yellow" if " warning   " in text[:20] else "")

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        with self._requests.writing(sys.stdout):
            self._console.print(Text(text, style), soft_wrap=True)

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        states = Text("\n")
        for name, state in self._states.items():
            states.append(f"{name} ").append(state, terminal.style(state)).append("   ")
        if self.activity is None:
            return states
        row = Table.grid(padding=(0, 1))
        cells: list[Any] = [
            Text(f"{self.activity}", overflow="ellipsis", no_wrap=True),
            Text(self.activity.elapsed, "dim"),
        ]
        share = self.activity.share
        bar = ProgressBar(total=1, completed=share or 0, width=BAR_WIDTH, pulse=share is None)
        row.add_row(bar, *cells)
        return Group(states, row)
