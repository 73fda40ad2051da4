"""Sets up logging for one rank: every line starts with time, rank and level, or has no prefix in a terminal."""

import logging
import sys
import time
from typing import TextIO

from conf.visible import visible

SHOWN = {"shown": True}
"""`log.info(text, extra=SHOWN)`: the text has signs for control characters already, and may have colors."""


class RankFormatter(logging.Formatter):
    """Puts time (local), rank and level before every line, so that lines of many ranks can be sorted and searched."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        """None: write messages without a prefix."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not hasattr(record, "shown"):
            text = visible(text)
        if self.rank is None:
            return f"warning   {text}" if record.levelno >= logging.WARNING else text
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        prefix = f"{now} rank {self.rank} {record.levelname} "
        return "\n".join(prefix + line for line in text.split("\n"))


class StdoutHandler(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stdout, because tests and callers replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def set_up(rank: int | None = None) -> None:
    """Send messages of Muster's loggers to standard output, each line with time, rank and level; without them if `rank` is None."""
    handler = StdoutHandler()
    handler.setFormatter(RankFormatter(rank))
    for name in ("jobs", "launcher"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
