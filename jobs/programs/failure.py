"""Reads in the output of a program that failed which rank failed first, and with which exception."""

import re
from collections.abc import Mapping, Sequence

from conf.errors import ProgramFailed

EXCEPTION = re.compile(
    r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning)|[A-Za-z_]\w*\.[\w.]*[A-Z]\w*): ?(?P<text>.*)$"
)
"""The last line of a traceback: `torch.OutOfMemoryError: CUDA out of memory. ...`."""
TRACEBACK = "Traceback (most recent call last):"
OF_TORCHRUN = "torch.distributed.elastic.multiprocessing.errors"
"""torchrun's own exception, which only says that a rank has failed."""
OF_RAY_TRAIN = re.compile(r"\[Rank (\d+) Error Snippet\]:$")
"""What Ray Train writes before the traceback of a worker, in the log of the first node."""
CONSEQUENCES = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket timeout")
"""Errors of the ranks whose neighbor has failed."""


def find(last: Mapping[int, Sequence[str]], ending: str, rank: int) -> ProgramFailed:
    """Return the failure that the last lines of the ranks show. `ending` says how the program ended, `rank` where."""
    found = [failure for number, lines in sorted(last.items()) if (failure := _in_lines(number, lines, ending))]
    causes = [item for item in found if not any(phrase in str(item).lower() for phrase in CONSEQUENCES)]
    return next(iter([*causes, *found]), None) or ProgramFailed(rank, f"the program {ending}; its log has no traceback")


def _in_lines(rank: int, lines: Sequence[str], ending: str) -> ProgramFailed | None:
    """Return the first exception after which the rank did not go on; None if there is no traceback."""
    starts = [number for number, line in enumerate(lines) if line.endswith(TRACEBACK)]
    for start in reversed(starts):
        indent = lines[start].removesuffix(TRACEBACK)
        worker = OF_RAY_TRAIN.search(lines[max(0, start - 1)])
        for number in range(start + 1, len(lines)):
            match = EXCEPTION.match(lines[number].removeprefix(indent))
            if match and not match["type"].startswith(OF_TORCHRUN):
                trace = "\n".join(lines[start : number + 1])
                name = match["type"].rpartition(".")[2]
                rank = int(worker[1]) if worker else rank
                return ProgramFailed(rank, f"{name}: {match['text']} (the program {ending})", name, trace)
            if match:
                break
    return None
