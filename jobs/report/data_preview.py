"""Shows what a run will train on (decoded samples, data sets, lengths, findings of the gates) on a page and in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from conf.schema_model import Gates
from conf.visible import visible
from jobs.data.batches import Rows
from jobs.data.quality_gates import MEANINGS, Verdict
from jobs.report import charts
from jobs.report.terminal import GREEN, RESET
from jobs.report.token_view import Decoder, LocationOf, SampleView, terminal_text, view_sample
from pages.render import render_page
from pages.run_facts import Fact

SAMPLES = {"train": 8, "validation": 2}
"""Number of samples of each split on the page."""
PAGE_TOKENS, TERMINAL_TOKENS = 2000, 600
"""Tokens of a sample that are shown: half from its beginning and half from its end, where the answer is."""


def render_html(
    data: dict[str, Any],
    splits: Mapping[str, Rows],
    location_of: Mapping[str, LocationOf],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packed: bool,
    verdicts: Sequence[Verdict],
    limits: Gates,
    name: str,
    about: Sequence[Fact],
    seed: int = 0,
) -> str:
    """The page of a run's data: one file that needs no other.

    data: the contents of RUN/data/data.json. splits, location_of: by split (train, validation). max_length: in tokens.
    limits: of the gates. name: of the run. about: its model, tokenizer and chat template.
    """
    decoder = Decoder(tokenizer)
    rows = splits["train"]
    lengths = rows.samples.lengths[rows.chosen]
    found = {verdict.gate: verdict.count for verdict in verdicts}
    return render_page(
        "preview.html.j2",
        name=name,
        about=about,
        gates=[(gate, text, found.get(gate, 0), getattr(limits, gate)) for gate, text in MEANINGS.items()],
        data=data,
        rows=len(rows),
        fill=float(lengths.sum()) / max(1, len(rows) * max_length),
        max_length=max_length,
        packed=packed,
        verdicts=sorted(verdicts, key=lambda verdict: not verdict.stops),
        samples={
            split: [
                (
                    view_sample(number, splits[split], decoder, location_of[split], PAGE_TOKENS),
                    _cut_notes(number, splits[split], location_of[split], max_length),
                )
                for number in random_samples(splits[split], count, seed)
            ]
            for split, count in SAMPLES.items()
        },
        quantiles=_quantiles(lengths),
        lengths=charts.length_histogram(lengths, max_length),
        fills=charts.fill_histogram(rows.lengths, max_length) if packed else None,
        padding=[] if packed else charts.padding(lengths, seed),
        min_packed_rows=-(-int(lengths.sum()) // max_length),
        sets=charts.tokens_by_set(data, rows),
    )


def render_terminal(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    location_of: LocationOf,
    *,
    count: int = 1,
    seed: int = 0,
    color: bool,
) -> str:
    """Some samples of a split as text, with the trained tokens in green, or without color between « and »."""
    decoder, legend = Decoder(tokenizer), "in green" if color else "between « and »"
    texts = []
    for number in random_samples(rows, count, seed):
        sample = view_sample(number, rows, decoder, location_of, TERMINAL_TOKENS)
        header = (
            f"sample    {visible(sample.location)}: {sample.tokens:,} tokens, {sample.trained:,} trained ({legend})"
        )
        texts.append(f"{header}\n{_terminal_sample(sample, color)}")
    return "\n\n".join(texts)


def _terminal_sample(sample: SampleView, color: bool) -> str:
    begin, end = (GREEN, RESET) if color else ("«", "»")
    parts = []
    for runs in sample.parts:
        text = ""
        for trained, groups in runs:
            run = "".join(terminal_text(segment) for group in groups for segment in group.segments)
            if trained and color:  # Each line gets its own color codes: pagers reset the color at the end of a line.
                run = run.replace("\n", f"{end}\n{begin}")
            text += f"{begin}{run}{end}" if trained else run
        parts.append(text.rstrip())
    return f"\n[... {sample.omitted:,} tokens ...]\n".join(parts)


def random_samples(rows: Rows, count: int, seed: int) -> list[int]:
    """Numbers of up to `count` different samples of a split."""
    total = len(rows.chosen)
    # A split may hold a sample several times, so more are drawn than needed.
    drawn = np.random.default_rng(seed).choice(total, min(8 * count, total), replace=False)
    return list(dict.fromkeys(rows.chosen[drawn].tolist()))[:count]


def _cut_notes(number: int, rows: Rows, location_of: LocationOf, max_length: int) -> list[str]:
    """Notes about cuts. A part of a row that was split has a neighbor from the same line of the same file."""
    lengths = rows.samples.lengths
    notes: list[str] = []
    if number and lengths[number - 1] >= max_length and location_of(number - 1) == location_of(number):
        notes.append("continues the previous sample")
    if lengths[number] >= max_length:
        split = number + 1 < len(lengths) and location_of(number + 1) == location_of(number)
        notes.append("continued in the next sample" if split else "as long as data.max_length: probably truncated")
    return notes


def _quantiles(lengths: NDArray[np.int64]) -> list[tuple[str, int]]:
    """(name, tokens)."""
    if not len(lengths):
        return []
    values = np.percentile(lengths, (0, 50, 95, 100), method="nearest").tolist()
    named = zip(("shortest", "median", "95th percentile", "longest"), values, strict=True)
    return [*((name, int(value)) for name, value in named), ("mean", round(float(lengths.mean())))]
