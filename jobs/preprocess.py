"""Turns raw rows into what training reads: tokenised sets, built once for all runs, and this run's choice of their samples."""

import gc
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from conf import datasets
from conf.choices import Executor, Format, Overlong
from conf.errors import DataError, Problem
from conf.files import new_folder, read_json, write_json, write_text
from conf.schema import Config, DataSet
from jobs.data import batches, cache_key, formats, quality_gates, sources, token_dataset
from jobs.data import cache as store
from jobs.data import splits as selection
from jobs.data.quality_gates import Findings
from jobs.data.splits import Samples
from jobs.data.tokenize import Recipe
from jobs.report import data_preview
from jobs.tokenization import encoder
from jobs.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

TRIED = 300
"""Rows on which the encoder's fast ways are compared with the slow one before they are trusted."""
VALIDATION = "validation"
HELD_OUT = "held out"
"""Name of the set at `data.validation_path`: no training set can have it."""


@dataclass(frozen=True)
class Built:
    """A tokenised set, and where its rows lie now: another run may have built it from the same rows elsewhere."""

    path: str
    folder: Path
    about: dict[str, Any]
    """Its set.json."""

    def here(self, place: str) -> str:
        """`file:line` by the path of now."""
        return place.replace(self.about["path"], self.path, 1)


Sets = Mapping[str, Built]


def run(config: Config) -> None:
    """Write RUN/data, unless it is there already. Raises DataError naming the bad rows by file and line."""
    folder = Path(config.run_dir) / "data"
    if read_json(folder / "data.json"):
        log.info(f"data is there already: {folder}")
        return
    words = load_tokenizer(config)
    gc.freeze()  # what is imported and read by now stays: looking for garbage in it took an eighth of the whole time
    trained = {name: tokenised(name, one, config, words) for name, one in datasets.training(config.data).items()}
    held = datasets.held_out(config.data)
    apart = {HELD_OUT: tokenised(HELD_OUT, held, config, words)} if held else {}
    sets = trained | apart
    findings = _findings(sets)
    chosen = choose(trained, apart, config, findings)
    every = token_dataset.read([one.folder for one in trained.values()])
    others = token_dataset.read([one.folder for one in apart.values()]) if apart else every
    rows = {
        "train": batches.arrange(every, chosen["train"], config.data.max_length if config.data.packing else None),
        VALIDATION: batches.arrange(others, chosen[VALIDATION]),
    }
    about = _about(sets, {"train": list(trained), VALIDATION: list(apart or trained)}, rows)
    verdicts = _judged(findings, about, config)
    _write(folder, sets, about, rows, words, verdicts, config)


def _judged(findings: Findings, about: dict[str, Any], config: Config) -> list[quality_gates.Verdict]:
    """What the gates found, said. Raises DataError with all that stops the run, or where a split is left without samples."""
    rows = sum(one["rows"] for one in about["sets"].values())
    limits = config.data.gates
    if config.data.overlong is Overlong.split:  # nothing is lost
        limits = replace(limits, overlong=1.0)
    verdicts = quality_gates.judged(findings, rows, limits)
    for verdict in verdicts:
        if not verdict.stops:
            log.warning(f"{verdict}")
    if stops := [verdict.problem for verdict in verdicts if verdict.stops]:
        raise DataError(*stops)
    for split in about["splits"]:
        if not about[split]["samples"]:
            raise DataError(
                Problem(
                    "data.path",
                    ", ".join(one["source"] for one in about["sets"].values()),
                    f"leaves no samples for {split}: {rows:,} rows{_lost(findings)}; see data.max_length, data.overlong, "
                    "data.validation_fraction and the weights of data.sets",
                )
            )
    return verdicts


def _lost(findings: Findings) -> str:
    return "".join(f", {count:,} {quality_gates.MEANINGS[gate]}" for gate, count in findings.counts.items())


def tokenised(name: str, one: DataSet, config: Config, words: PreTrainedTokenizerBase) -> Built:
    """A tokenised set, found in the cache or built. Raises DataError for rows that cannot be read."""
    asked = config.data
    cache = Path(asked.cache) if asked.cache else Path(config.run_dir).parent / ".data"
    blocks = partial(sources.blocks, one.path, one.split, asked.max_rows)

    def unchanged() -> None:
        if cache_key.states(one.path) != before:
            said = "has changed while it was read: start again when nothing writes to it"
            raise DataError(Problem("data.path", one.path, said))

    first = list(islice(_readable(blocks()), TRIED))
    if not first and not any(True for block in blocks() for _ in block.parsed()):
        raise DataError(Problem("data.path", one.path, "has no rows"))
    shape = _shape(name, first, one) if first else one.format.name
    before = cache_key.states(one.path)
    key = cache_key.key(one, asked, words, shape, cache)
    folder = store.built(cache, key)
    if folder:
        log.info(f"tokens    {name}: there already, {folder}")
    else:
        recipe = Recipe(words, shape, one.fields, one.roles, asked.mask, asked.max_length, asked.overlong)
        recipe = _tried(recipe, first)
        size = sources.size(one.path)
        total = (size, "B") if size is not None else (len(sources.hub(one.path)), " rows")
        folder = store.build(cache, key, recipe, one.path, blocks, unchanged, workers=_workers(config), total=total)
    return Built(one.path, folder, read_json(folder / "set.json"))


def choose(trained: Sets, apart: Sets, config: Config, findings: Findings) -> dict[str, Samples]:
    """The sample numbers of each split; what is found on the way is noted."""
    folders = [one.folder for one in trained.values()]
    hashes, origins = ([token_dataset.hashes(one, of) for one in folders] for of in ("hashes", "origins"))
    sets = selection.Sets(np.concatenate(hashes), np.concatenate(origins), [0, *accumulate(map(len, hashes))])
    if apart:
        train, held_hashes = np.arange(len(sets.hashes)), token_dataset.hashes(apart[HELD_OUT].folder)
        held = np.arange(len(held_hashes))
    else:
        train, held = selection.held_out(sets, config.data.validation_fraction, config.data.seed)
    kept, doubles = selection.without_duplicates(train, sets.hashes)
    if config.data.drop_duplicates:
        train = kept
        log.info(f"dropped   {len(doubles):,} samples that are equal to one before")
    else:
        places = [_place(trained.values(), number) for number in doubles[: quality_gates.FIRST].tolist()]
        findings.note("duplicates", places, len(doubles), of=len(train))
    if apart:
        common = selection.overlap(held_hashes, sets.hashes[train])
        places = [_place(apart.values(), number) for number in common[: quality_gates.FIRST].tolist()]
        findings.note("overlap", places, len(common), of=len(held))
    described = datasets.training(config.data)
    return {"train": selection.weighted(train, sets, described, config.data.seed), VALIDATION: held}


def _readable(blocks: Iterator[sources.Block]) -> Iterator[tuple[str, sources.Row]]:
    for block in blocks:
        for number, row in block.parsed():
            if not isinstance(row, sources.Unreadable):
                yield f"{block.place}{number}", row


def _shape(name: str, rows: list[tuple[str, sources.Row]], one: DataSet) -> str:
    """The format asked for, or the one that the first row's columns show, or else the next one's; says which, and why."""
    assert one.format is not None
    if one.format is not Format.auto:
        return one.format.name
    errors = []
    for where, row in rows:
        try:
            shape, why = formats.recognise(row, one.fields)
        except ValueError as error:
            errors.append(Problem("data.format", "auto", f"{error} ({where})"))
            continue
        log.info(f"format    {name}: {shape}, because {why}")
        return shape
    raise DataError(errors[0])


def _tried(recipe: Recipe, rows: list[tuple[str, sources.Row]]) -> Recipe:
    """The recipe with the encoder's fast ways, unless they differ from the slow one on any of these rows."""
    found = []
    for _, row in rows:
        try:
            found.append(formats.convert(row, recipe.shape, recipe.fields, recipe.roles))
        except ValueError:
            continue  # the gates will say so
    difference = encoder.first_difference(recipe.tokenizer, found, mask=recipe.mask.name)
    ways = encoder.Encoder(recipe.tokenizer, mask=recipe.mask.name, fast=difference is None).description
    log.info(f"encoder   {ways}, compared on {len(found)} rows" + (f": {difference}" if difference else ""))
    return replace(recipe, fast=difference is None)


def _workers(config: Config) -> int:
    if config.data.workers:
        return config.data.workers
    return (
        len(os.sched_getaffinity(0)) if config.cluster.executor is Executor.local else config.cluster.cpu.cpus_per_rank
    )


def _findings(sets: Sets) -> Findings:
    """What the gates found when the sets were built."""
    found = Findings()
    for one in sets.values():
        known = Findings(**one.about["findings"])
        first = {
            gate: [(one.here(place), detail) for place, detail in examples] for gate, examples in known.first.items()
        }
        found.merge(Findings(known.counts, first))
    return found


def _place(sets: Iterable[Built], number: int) -> str:
    """`file:line` of a sample, numbered through these sets."""
    for one in sets:
        if number < one.about["samples"]:
            return one.here(*token_dataset.places(one.folder, [number]))
        number -= one.about["samples"]
    raise IndexError(number)


def _write(
    folder: Path,
    sets: Sets,
    about: dict[str, Any],
    rows: dict[str, batches.Rows],
    words: PreTrainedTokenizerBase,
    verdicts: list[quality_gates.Verdict],
    config: Config,
) -> None:
    """Publish RUN/data: the choice, links to the sets, the tokenizer, and the page to look at."""
    places = {split: partial(_place, [sets[name] for name in names]) for split, names in about["splits"].items()}
    with new_folder(folder) as beside:
        (beside / "sets").mkdir()
        for name, one in sets.items():
            target = os.path.relpath(one.folder.resolve(), folder.parent.resolve() / "data/sets")
            (beside / "sets" / name).symlink_to(target)
        for split, found in rows.items():
            np.save(beside / f"{split}.npy", found.chosen)
        words.save_pretrained(beside / "tokenizer")
        write_json(beside / "data.json", about)
        text = data_preview.html(
            about,
            rows,
            places,
            words,
            max_length=config.data.max_length,
            packed=config.data.packing,
            verdicts=verdicts,
            seed=config.data.seed,
        )
        write_text(beside / "preview.html", text)
        log.info(data_preview.terminal(rows["train"], words, places["train"], count=config.data.preview, color=True))
    log.info(f"data      {folder}, and what it looks like in preview.html")


def _about(sets: Sets, splits: dict[str, list[str]], rows: dict[str, batches.Rows]) -> dict[str, Any]:
    """What RUN/data/data.json says: each set, and each split's sets and sizes."""
    about: dict[str, Any] = {"sets": {}, "splits": splits}
    for name, one in sets.items():
        counts = {key: one.about[key] for key in ("rows", "samples", "tokens", "trained_tokens")}
        about["sets"][name] = {"source": one.path, "format": one.about["shape"], **counts, "epoch": 0}
    for split, found in rows.items():
        about[split] = {
            "samples": len(found.chosen),
            "tokens": int(found.lengths.sum()),
            "trained_tokens": int(found.counts.sum()),
        }
    ends = np.cumsum([sets[name].about["samples"] for name in splits["train"]])
    counts = np.bincount(np.searchsorted(ends, rows["train"].chosen, side="right"), minlength=len(ends))
    for name, count in zip(splits["train"], counts.tolist(), strict=True):
        about["sets"][name]["epoch"] = count
    return about
