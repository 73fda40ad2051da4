"""Computes charts and tables of the data as numbers for preview.html: sample lengths, packing, padding and data sets."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.plural import plural
from jobs.data.batches import Rows

MICRO_BATCHES = (1, 2, 4, 8)
"""Values of train.micro_batch for which the padding is shown."""


@dataclass(frozen=True)
class Histogram:
    """Bars as (left, width, height, label), names of the axes, ticks and a mark as (position, label).

    All numbers are percent of the chart.
    """

    bars: list[tuple[float, float, float, str]]
    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    mark: tuple[float, str] | None = None


def length_histogram(lengths: NDArray[np.int64], max_length: int) -> Histogram | None:
    """Number of samples by their tokens, or None without samples.

    The axis reaches at least to max_length. It is logarithmic if the largest value is more than 16 times the smallest.
    """
    if not len(lengths):
        return None
    low, high = max(1, int(lengths.min())), max(int(lengths.max()), max_length) + 1
    logarithmic = high > 16 * low
    if logarithmic:
        edges = np.unique(np.geomspace(low, high, 41).round().astype(np.int64))
    else:
        edges = np.arange(low, high + (step := -(-(high - low) // 40)), step)
    counts = np.add.reduceat(np.bincount(lengths, minlength=int(edges[-1])), edges[:-1])

    def percent(value: float) -> float:
        low, high = edges[0], edges[-1]
        if logarithmic:
            return 100 * math.log(value / low) / math.log(high / low)
        return float(100 * (value - low) / (high - low))

    ticks = _powers_of_two(low, high) if logarithmic else _round_integers(low, high)
    labels = [_range_label(int(a), int(b) - 1, "token") for a, b in zip(edges, edges[1:], strict=False)]
    return _histogram(
        [percent(edge) for edge in edges.tolist()],
        counts,
        labels,
        x_name="tokens of a sample" + (", log scale" if logarithmic else ""),
        x_ticks=[(percent(tick), f"{tick:,}") for tick in ticks],
        mark=(percent(max_length), f"max_length {max_length:,}"),
        unit="sample",
    )


def fill_histogram(lengths: NDArray[np.int64], max_length: int) -> Histogram:
    """Number of packed rows by how full they are, in steps of 2%."""
    counts = np.bincount(np.minimum((lengths - 1) * 50 // max_length, 49), minlength=50)
    labels = [f"{2 * step}-{2 * step + 2}% full" for step in range(50)]
    ticks = [(float(tick), f"{tick}%") for tick in (0, 25, 50, 75, 100)]
    return _histogram(
        [2.0 * step for step in range(51)], counts, labels, x_name="how full a row is", x_ticks=ticks, unit="row"
    )


def _histogram(
    edges: list[float],
    counts: NDArray[np.int64],
    labels: list[str],
    *,
    x_name: str,
    x_ticks: list[tuple[float, str]],
    mark: tuple[float, str] | None = None,
    unit: str,
) -> Histogram:
    highest, total = max(1, int(counts.max(initial=0))), max(1, int(counts.sum()))
    bars = [
        # at least 0.7% high, so that a bar of few samples stays visible
        (left, right - left, max(0.7, 100 * count / highest), f"{label}: {plural(count, unit)} ({count / total:.1%})")
        for left, right, count, label in zip(edges, edges[1:], counts.tolist(), labels, strict=False)
        if count
    ]
    y_ticks = [(100 * tick / highest, _abbreviated(tick)) for tick in _round_integers(0, highest, 4) if tick]
    return Histogram(bars, x_name, f"{unit}s", x_ticks, y_ticks, mark)


def padding(lengths: NDArray[np.int64], seed: int) -> list[tuple[int, float]]:
    """(micro batch, share of tokens that is padding), for random micro batches.

    Each micro batch is as long as its longest row, rounded up to a multiple of eight.
    """
    shuffled, shares = np.random.default_rng(seed).permutation(lengths), []
    for count in MICRO_BATCHES:
        groups = shuffled[: len(shuffled) // count * count].reshape(-1, count)
        if len(groups):
            padded = (-(-groups.max(axis=1) // 8) * 8).sum() * count
            shares.append((count, 1 - float(groups.sum() / padded)))
    return shares


def tokens_by_set(data: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """Tokens and trained tokens per epoch of each training set, the largest first.

    data: the contents of RUN/data/data.json. Also gives the set's share of all tokens (0 to 1), and the widths of its bars in
    percent of the largest set's: `width` for all its tokens, `trained_width` for the trained ones.
    """
    names = data["splits"]["train"]
    ends = np.cumsum([data["sets"][name]["samples"] for name in names])
    set_of_sample = np.searchsorted(ends, rows.chosen, side="right")

    def sum_by_set(values: NDArray[np.int64]) -> list[float]:
        sums: list[float] = np.bincount(set_of_sample, weights=values[rows.chosen], minlength=len(names)).tolist()
        return sums

    tokens, trained = sum_by_set(rows.samples.lengths), sum_by_set(rows.samples.label_counts)
    largest, total = max(1, *tokens), max(1, sum(tokens))
    sets = [
        {
            "name": name,
            "tokens": int(count),
            "trained": int(trained_count),
            "share": count / total,
            "width": 100 * count / largest,
            "trained_width": 100 * trained_count / largest,
        }
        for name, count, trained_count in zip(names, tokens, trained, strict=True)
    ]
    return sorted(sets, key=lambda item: -item["tokens"])


def _powers_of_two(low: int, high: int) -> list[int]:
    """At most seven powers of two within the axis."""
    powers = [2**power for power in range(high.bit_length() + 1) if low <= 2**power <= high]
    return powers[-1 :: -max(1, -(-len(powers) // 7))][::-1]


def _round_integers(low: int, high: int, count: int = 6) -> list[int]:
    """At most about `count` round integers within the axis."""
    size = 10 ** int(math.log10(max(1, (high - low) / count)))
    step = next(step for step in (size, 2 * size, 5 * size, 10 * size) if (high - low) / step <= count)
    return list(range(-(-low // step) * step, high + 1, step))


def _abbreviated(number: int) -> str:
    for size, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:g}{suffix}"
    return str(number)


def _range_label(low: int, high: int, unit: str) -> str:
    return plural(low, unit) if low == high else f"{low:,}-{high:,} {unit}s"
