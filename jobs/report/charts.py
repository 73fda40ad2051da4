"""Charts and tables of rows, in numbers that the page's template draws: lengths, fill, padding and the sets' shares."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.data.batches import Rows

MICRO_BATCHES = (1, 2, 4, 8)
"""Rows a rank might hold at once, where padding is told."""


@dataclass(frozen=True)
class Chart:
    """Bars as (left, width, height, what it is), ticks and marks as (where, label): all in percent of the chart."""

    bars: list[tuple[float, float, float, str]]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]
    mark: tuple[float, str] | None = None


def of_lengths(lengths: NDArray[np.int64], max_length: int) -> Chart | None:
    """How many samples have how many tokens; the axis is logarithmic where lengths differ much, and reaches max_length."""
    if not len(lengths):
        return None
    low, high = max(1, int(lengths.min())), max(int(lengths.max()), max_length) + 1
    wide = high > 16 * low
    if wide:
        edges = np.unique(np.geomspace(low, high, 41).round().astype(np.int64))
    else:
        edges = np.arange(low, high + (step := -(-(high - low) // 40)), step)
    counts = np.add.reduceat(np.bincount(lengths, minlength=int(edges[-1])), edges[:-1])

    def at(value: float) -> float:
        low, high = edges[0], edges[-1]
        return 100 * (math.log(value / low) / math.log(high / low) if wide else (value - low) / (high - low))

    ticks = _powers(low, high) if wide else _round(low, high)
    mark = (at(max_length), f"max_length {max_length:,}")
    says = [_span(int(a), int(b) - 1, "token") for a, b in zip(edges, edges[1:], strict=False)]
    return _chart([at(edge) for edge in edges.tolist()], counts, says, [(at(t), f"{t:,}") for t in ticks], mark)


def of_fill(lengths: NDArray[np.int64], max_length: int) -> Chart:
    """How many packed rows are how full, in steps of 2%."""
    counts = np.bincount(np.minimum((lengths - 1) * 50 // max_length, 49), minlength=50)
    says = [f"{2 * step}-{2 * step + 2}% full" for step in range(50)]
    ticks = [(float(tick), f"{tick}%") for tick in (0, 25, 50, 75, 100)]
    return _chart([2.0 * step for step in range(51)], counts, says, ticks, unit="row")


def _chart(
    edges: list[float],
    counts: NDArray[np.int64],
    says: list[str],
    across: list[tuple[float, str]],
    mark: tuple[float, str] | None = None,
    *,
    unit: str = "sample",
) -> Chart:
    top, total = max(1, int(counts.max(initial=0))), max(1, int(counts.sum()))
    bars = [
        (left, right - left, max(0.7, 100 * count / top), f"{say}: {_many(count, unit)} ({count / total:.1%})")
        for left, right, count, say in zip(edges, edges[1:], counts.tolist(), says, strict=False)
        if count
    ]
    return Chart(bars, across, [(100 * tick / top, _short(tick)) for tick in _round(0, top, 4) if tick], mark)


def padding(lengths: NDArray[np.int64], seed: int) -> list[tuple[int, float]]:
    """(rows at once, share of tokens that is padding) of random micro batches, each as long as its longest row, in eights."""
    mixed, found = np.random.default_rng(seed).permutation(lengths), []
    for count in MICRO_BATCHES:
        groups = mixed[: len(mixed) // count * count].reshape(-1, count)
        if len(groups):
            taken = (-(-groups.max(axis=1) // 8) * 8).sum() * count
            found.append((count, 1 - float(groups.sum() / taken)))
    return found


def sources(about: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """Of each training set, the largest first: tokens an epoch, how many are trained, and percent of the largest's."""
    names = about["splits"]["train"]
    ends = np.cumsum([about["sets"][name]["samples"] for name in names])
    which = np.searchsorted(ends, rows.chosen, side="right")
    sums = (
        np.bincount(which, weights=values[rows.chosen], minlength=len(names)).tolist()
        for values in (rows.samples.lengths, rows.samples.labels)
    )
    tokens, trained = sums
    top, total = max(1, *tokens), max(1, sum(tokens))
    found = [
        {"name": name, "tokens": int(n), "trained": int(t), "share": n / total, "width": 100 * n / top, "lit": 100 * t / top}
        for name, n, t in zip(names, tokens, trained, strict=True)
    ]  # fmt: skip
    return sorted(found, key=lambda one: -one["tokens"])


def _powers(low: int, high: int) -> list[int]:
    """At most seven powers of two within the axis."""
    found = [2**power for power in range(high.bit_length() + 1) if low <= 2**power <= high]
    return found[-1 :: -max(1, -(-len(found) // 7))][::-1]


def _round(low: int, high: int, count: int = 6) -> list[int]:
    """At most about `count` round numbers within the axis."""
    size = 10 ** int(math.log10(max(1, (high - low) / count)))
    step = next(step for step in (size, 2 * size, 5 * size, 10 * size) if (high - low) / step <= count)
    return list(range(-(-low // step) * step, high + 1, step))


def _short(number: int) -> str:
    for size, sign in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:g}{sign}"
    return str(number)


def _many(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def _span(low: int, high: int, unit: str) -> str:
    return _many(low, unit) if low == high else f"{low:,}-{high:,} {unit}s"


@dataclass(frozen=True)
class Curve:
    """Lines and dots as SVG points, in percent of the chart from its top left, with ticks as (where, label) as in `Chart`."""

    lines: list[str]
    dots: list[tuple[float, float, str]]
    """(x, y, what it is)."""
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


POINTS = 300
"""Points of a line at most: longer ones become means of neighbours."""


def of_curves(series: list[list[tuple[int, float]]], dots: list[tuple[int, float]]) -> Curve:
    """Values by step, none of them empty; the upward axis is logarithmic where all are above 0 and differ much."""
    shown = [_thinned(points) for points in series]
    both = [*(point for points in shown for point in points), *dots]
    begin, end = min(x for x, _ in both), max(x for x, _ in both)
    low, high = min(y for _, y in both), max(y for _, y in both)
    wide = low > 0 and high > 50 * low
    if not wide:
        low = min(low, 0.0) if low <= 0.5 * high else low
        high = high if high > low else low + max(abs(low), 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        up = math.log(y / low) / math.log(high / low) if wide else (y - low) / (high - low)
        return round(100 * (x - begin) / max(1, end - begin), 2), round(100 * (1 - up), 2)

    lines = [" ".join(f"{x},{y}" for x, y in (place(*point) for point in points)) for points in shown]
    marked = [(*place(x, y), f"step {x:,}: {y:.4f}") for x, y in dots]
    ticks = [10.0**power for power in range(-12, 13)] if wide else _even(low, high)
    up = [(100 - place(begin, tick)[1], f"{tick:.6g}") for tick in ticks if low <= tick <= high]
    across = [
        (place(tick, high)[0], f"{tick:,}") for tick in _round(int(begin), max(int(end), int(begin) + 1)) if tick <= end
    ]
    return Curve(lines, marked, across, up)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), max(1, size))]
    return [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]


def _even(low: float, high: float) -> list[float]:
    """At most six round numbers within the axis."""
    size = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 5)
    return [round(step * number, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
