"""Reads when each attempt of a training began and ended, and how. RUN/report.html and `muster compare` show it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.files import read_json
from pages.curves import number


@dataclass(frozen=True)
class Attempt:
    """One start of the training. Times are in seconds since 1970."""

    number: int
    started: float
    ended: float | None
    """None: it has no verdict yet."""
    status: str
    """`completed`, `preempted`, ...; empty without a verdict."""
    reason: str
    step: int | None
    """The last step."""
    resumed: int | None
    """The step of the checkpoint that it continued from; None: from the beginning."""
    host: str
    gpus: int | None = None
    """On all nodes; None: not recorded."""
    ended_early: bool = False
    """Whether it completed before its last step, as one of the worst of a sweep."""


def read(run: Path) -> list[Attempt]:
    """The attempts of the job `train`, oldest first. Leaves out those whose files are damaged, or have no time of the start."""
    folder = run / "jobs/train"
    numbers = {int(path.name[8:]) for path in folder.glob("attempt-*") if path.is_dir() and path.name[8:].isdecimal()}
    numbers |= {int(path.stem[8:]) for path in folder.glob("attempt-*.json") if path.stem[8:].isdecimal()}
    return [found for count in sorted(numbers) if (found := _read(folder, count))]


def _read(folder: Path, count: int) -> Attempt | None:
    verdict = _object(folder / f"attempt-{count}.json")
    begin = _object(folder / f"attempt-{count}" / "begin.json")
    started = number(verdict.get("started")) or number(begin.get("started"))
    if started is None:
        return None
    step, resumed = number(verdict.get("step")), number(verdict.get("resumed", begin.get("resumed")))
    gpus = number(verdict.get("gpus", begin.get("gpus")))
    return Attempt(
        number=count,
        started=started,
        ended=number(verdict.get("ended")),
        status=str(verdict.get("status") or ""),
        reason=str(verdict.get("reason") or ""),
        step=None if step is None else int(step),
        resumed=None if resumed is None else int(resumed),
        host=str(verdict.get("host") or begin.get("host") or ""),
        gpus=None if gpus is None else int(gpus),
        ended_early=verdict.get("ended_early") is True,
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
