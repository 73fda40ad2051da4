"""What the charts of a page draw: series of (step, value), thinned so that a page stays small. charts.js draws them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SERIES_POINTS = 600
"""Maximum number of points of a series. A longer one is replaced by means of neighboring points."""

Line = dict[str, Any]
"""One line of metrics.jsonl."""
Point = tuple[int, float]
"""(step, value)."""


@dataclass(frozen=True)
class Series:
    """One curve. `look` numbers its color and dashes; equal numbers look equal on all charts of a page."""

    name: str
    points: list[Point]
    look: int = 0
    dots: bool = False
    """Whether its points are far apart, so that each gets a dot."""
    smooth: bool = False
    """Whether the page's smoothing applies to it."""


@dataclass(frozen=True)
class Chart:
    """A chart of one value by step. Series without points are left out."""

    title: str
    axis: str
    """The name of the y axis: what is counted, and its unit."""
    series: list[Series]
    number: str = "plain"
    """How values are written: plain (1.2345), count (12,345), share (12.3%), small (1.23e-4)."""
    note: str = ""

    @property
    def is_logarithmic(self) -> bool:
        """Whether the chart begins with a logarithmic scale: all values are above 0, and they span more than a factor of 50."""
        values = [value for item in self.series for _, value in item.points]
        return bool(values) and min(values) > 0 and max(values) > 50 * min(values)

    def as_json(self, most: int = SERIES_POINTS) -> dict[str, Any]:
        """What charts.js reads, with at most `most` points of a series."""
        return {
            "title": self.title,
            "axis": self.axis,
            "number": self.number,
            "log": self.is_logarithmic,
            "series": [
                {
                    "name": item.name,
                    "look": item.look,
                    "dots": item.dots,
                    "smooth": item.smooth,
                    "x": [step for step, _ in points],
                    "y": [float(f"{value:.6g}") for _, value in points],
                }
                for item in self.series
                if (points := thinned(item.points, most))
            ],
        }


def drawn(charts: Iterable[Chart]) -> list[Chart]:
    """The charts that have a point."""
    return [chart for chart in charts if any(item.points for item in chart.series)]


def number(value: Any) -> float | None:
    """`value` as a float; None for what is no finite number. A file of somebody else's run may hold anything."""
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:
        return None


def points(lines: Iterable[Line], name: str) -> list[Point]:
    """(step, value) of one metric, without infinite and NaN values."""
    found = [(line.get("step"), number(line.get(name))) for line in lines]
    return [(step, value) for step, value in found if isinstance(step, int) and value is not None]


def thinned(points: list[Point], most: int) -> list[Point]:
    """At most `most` points: (last step, mean value) of groups of neighbors."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]


def median(lines: Iterable[Line], name: str) -> float | None:
    """The median of one metric, the upper one of two; None if no line has it."""
    values = sorted(value for _, value in points(lines, name))
    return values[len(values) // 2] if values else None


def clock(seconds: float) -> str:
    """Seconds as `hours:minutes:seconds`, e.g. 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
