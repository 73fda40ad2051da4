"""Shows the log of rank 0 while a job runs on this machine."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.files import read_json
from conf.visible import visible
from launcher.run_folder.log_lines import LOG_PREFIX
from launcher.run_folder.status import COMPLETED
from launcher.submit.activity import BAR
from launcher.submit.display import Plain

GRACE_S = 15
"""How long the other ranks may continue after one has failed. Without this, ranks that wait for a dead one never end."""
PAUSE_S = 0.2


class Log:
    """The log of a started job. `attempt` is the attempt's folder, where a rank that has failed leaves its record.

    Lines of level ERROR are kept in `errors` instead of printed: the last one is the reason that the attempt gives for its
    end, which must not be printed twice.
    """

    def __init__(self, started: Any, attempt: Path, display: Plain) -> None:
        self.attempt, self.errors = attempt, list[str]()
        self._started, self._display, self._path = started, display, Path(started.paths.stdout)
        self._position, self._unfinished_line = 0, ""
        self._failed_at: float | None = None

    def show_more(self) -> bool:
        """Print what is new, then pause. Returns False once the job has ended, or GRACE_S after a rank has failed."""
        ended = self._started.done()  # before reading, so that the last lines are read after the end
        if self._path.exists():
            with self._path.open(encoding="utf-8", errors="replace") as file:
                file.seek(self._position)
                text = file.read()
                self._position = file.tell()
            # a progress bar writes over its line, and does not end it before it is full
            *lines, self._unfinished_line = re.split("[\r\n]", self._unfinished_line + text)
            if ended or BAR.match(self._unfinished_line):
                lines, self._unfinished_line = [*lines, self._unfinished_line], ""
            self._print(lines)
        if ended:
            return False
        if self._failed_at is None and self._has_failed():
            self._failed_at = time.monotonic()
        if self._failed_at is not None and time.monotonic() - self._failed_at > GRACE_S:
            return False
        self._display.tick()
        time.sleep(PAUSE_S)
        return True

    def _has_failed(self) -> bool:
        """Whether a rank has recorded another end than a good one. On a busy machine, ranks take a while to leave after that."""
        records = map(read_json, self.attempt.glob("rank-*.json"))
        return any(record is not None and record["status"] != COMPLETED for record in records)

    def _print(self, lines: Sequence[str]) -> None:
        """Print log lines without their prefix, but with a level other than INFO.

        Leaves out submitit's own lines and the environment.
        """
        for line in lines:
            prefix = LOG_PREFIX.match(line)
            if prefix and prefix[1] == "ERROR":
                self.errors.append(line[prefix.end() :])
                continue
            message = LOG_PREFIX.sub(_level_prefix, line, count=1)
            if not message.startswith(("submitit ", "environment {")):
                self._display.line(visible(message))


def _level_prefix(match: re.Match[str]) -> str:
    level = match[1]
    return "" if level == "INFO" else f"{level.lower():<9} "
