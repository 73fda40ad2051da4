"""One line of `muster doctor`: what was looked at, what was found, whether that is good, and what to do if it is not."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How good it is."""

    green = "ok"
    yellow = "warning"
    """Something that some runs need does not work."""
    red = "error"
    """No run can work."""


@dataclass(frozen=True)
class Check:
    """One line."""

    topic: str
    name: str
    found: str
    level: Level = Level.green
    remedy: str = ""


def warning(topic: str, name: str, found: str, remedy: str) -> Check:
    """A yellow line."""
    return Check(topic, name, found, Level.yellow, remedy)


def error(topic: str, name: str, found: str, remedy: str) -> Check:
    """A red line."""
    return Check(topic, name, found, Level.red, remedy)
