"""Shows what a run will learn: its samples decoded, its sets, its lengths and what the gates found, as a page and in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from jobs.data.batches import Rows
from jobs.data.quality_gates import Verdict
from jobs.report import charts
from jobs.report.pages import filled
from jobs.report.token_view import Decoder, Places, printable, shown

SHOWN = {"train": 8, "validation": 2}
"""Samples of each split on the page."""
PAGE_TOKENS, TERMINAL_TOKENS = 2000, 600
"""Tokens of a sample that are shown: half from its beginning and half from its end, where the answer stands."""
GREEN, PLAIN = "\033[32m", "\033[0m"


def html(
    about: dict[str, Any],
    splits: Mapping[str, Rows],
    places: Mapping[str, Places],
    words: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packed: bool,
    found: Sequence[Verdict],
    seed: int = 0,
) -> str:
    """The page of a run's data: one file that needs no other. `about` is what RUN/data/data.json says; max_length in tokens."""
    decoder = Decoder(words)
    rows = splits["train"]
    lengths = rows.samples.lengths[rows.chosen]
    return filled(
        "preview.html.j2",
        about=about,
        rows=len(rows),
        fill=float(lengths.sum()) / max(1, len(rows) * max_length),
        max_length=max_length,
        packed=packed,
        found=sorted(found, key=lambda verdict: not verdict.stops),
        samples={
            split: [
                (
                    shown(number, splits[split], decoder, places[split], PAGE_TOKENS),
                    _notes(number, splits[split], places[split], max_length),
                )
                for number in drawn(splits[split], count, seed)
            ]
            for split, count in SHOWN.items()
        },
        quantiles=_quantiles(lengths),
        lengths=charts.of_lengths(lengths, max_length),
        fills=charts.of_fill(rows.lengths, max_length) if packed else None,
        padding=[] if packed else charts.padding(lengths, seed),
        at_least=-(-int(lengths.sum()) // max_length),
        sources=charts.sources(about, rows),
    )


def terminal(
    rows: Rows, words: PreTrainedTokenizerBase, places: Places, *, count: int = 1, seed: int = 0, colour: bool
) -> str:
    """Some samples of a split, the trained tokens in green, or else between « and »."""
    begin, end = (GREEN, PLAIN) if colour else ("«", "»")
    decoder, texts = Decoder(words), []
    for number in drawn(rows, count, seed):
        one, stretches = shown(number, rows, decoder, places, TERMINAL_TOKENS), []
        for runs in one.stretches:
            text = ""
            for trained, pieces in runs:
                part = "".join(printable(segment) for piece in pieces for segment in piece.segments)
                if colour:  # line by line, because pagers forget a colour at a line's end
                    part = part.replace("\n", f"{end}\n{begin}") if trained else part
                text += f"{begin}{part}{end}" if trained else part
            stretches.append(text.rstrip())
        how = "in green" if colour else "between « and »"
        head = f"sample    {one.place}: {one.tokens:,} tokens, {one.trained:,} trained, {how}"
        texts.append(f"{head}\n" + f"\n[... {one.left:,} tokens ...]\n".join(stretches))
    return "\n\n".join(texts)


def drawn(rows: Rows, count: int, seed: int) -> list[int]:
    """The numbers of some samples of a split, each once, by seed."""
    total = len(rows.chosen)
    tried = np.random.default_rng(seed).choice(total, min(8 * count, total), replace=False)
    return list(dict.fromkeys(rows.chosen[tried].tolist()))[:count]


def _notes(number: int, rows: Rows, places: Places, max_length: int) -> list[str]:
    """What is known of a cut: a part of a row that was split has a neighbour from the same place."""
    lengths, notes = rows.samples.lengths, list[str]()
    if number and lengths[number - 1] >= max_length and places(number - 1) == places(number):
        notes.append("goes on from the sample before")
    if lengths[number] >= max_length:
        split = number + 1 < len(lengths) and places(number + 1) == places(number)
        notes.append("goes on in the next sample" if split else "as long as data.max_length: most likely cut")
    return notes


def _quantiles(lengths: NDArray[np.int64]) -> list[tuple[str, int]]:
    if not len(lengths):
        return []
    found = np.percentile(lengths, (0, 50, 95, 100), method="nearest").tolist()
    named = zip(("shortest", "median", "95% are within", "longest"), found, strict=True)
    return [*((name, int(value)) for name, value in named), ("mean", round(float(lengths.mean())))]
