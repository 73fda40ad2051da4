"""Passes the output of the user's program on to the logs of its ranks, and keeps its end for the verdict."""

import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jobs.programs.command import LOG_PREFIX

KEPT = 200
"""Last lines of each rank that are kept for the verdict."""
MARK = re.compile(rf"\[{LOG_PREFIX}(\d+)\]:".encode())
"""Also in the middle of a line: a progress bar does not end its lines, and the mark of the next rank follows."""


class Output:
    """Reads the program's output in a thread. Lines that torchrun marks with a rank go to `attempt`/rank-R.log."""

    def __init__(self, stream: IO[bytes], attempt: Path, rank: int) -> None:
        self.attempt, self.rank = attempt, rank
        self.lines = 0
        """Lines read so far: it grows as long as the program writes anything."""
        self.last: defaultdict[int, list[str]] = defaultdict(list)
        """The last lines by rank. Lines without a mark belong to `rank`."""
        self._logs: dict[int, IO[bytes]] = {}
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.lines += 1
            unmarked, *marked = MARK.split(line)
            if unmarked:
                self._write(None, unmarked)
            for rank, text in zip(marked[::2], marked[1::2], strict=True):
                self._write(int(rank), text)

    def _write(self, mark: int | None, text: bytes) -> None:
        """Write a line, or the part of one that belongs to the rank `mark`."""
        rank = self.rank if mark is None else mark
        text = text if text.endswith(b"\n") else text + b"\n"
        for log in self._logs_of(rank, is_marked=mark is not None):
            log.write(text)
        kept = self.last[rank]
        kept.append(text.decode(errors="replace").rstrip("\n"))
        del kept[:-KEPT]

    def _logs_of(self, rank: int, is_marked: bool) -> Iterator[IO[bytes]]:
        """The logs that a line goes to. That of this task is its stdout, which also shows the first of its ranks."""
        if rank == self.rank:
            sys.stdout.flush()
            yield sys.stdout.buffer.raw if hasattr(sys.stdout.buffer, "raw") else sys.stdout.buffer
        if is_marked:
            if rank not in self._logs:
                self._logs[rank] = (self.attempt / f"rank-{rank}.log").open("ab", buffering=0)
            yield self._logs[rank]

    def finish(self) -> None:
        """Wait a moment for the last lines. A process that the program left behind may keep the stream open."""
        self._thread.join(timeout=5)
        if not self._thread.is_alive():
            for log in self._logs.values():
                log.close()
