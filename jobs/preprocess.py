"""Turns raw rows into what training reads: tokenised sets, built once for all runs, and this run's choice of their samples."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from conf import datasets
from conf.errors import DataError, Problem
from conf.files import new_folder, read_json, write_json, write_text
from conf.schema import Config, DataSet, Executor, Format, Overlong
from jobs import data, encode, formats, gates, identity, page, samples, selection, sources, store
from jobs.gates import Findings
from jobs.model import tokenizer
from jobs.selection import Samples, Sets
from jobs.tokenise import Recipe

TRIED = 300
"""Rows on which the encoder's fast ways are compared with the slow one before they are trusted."""
VALIDATION = "validation"
HELD_OUT = "held out"
"""Name of the set at `data.validation_path`: no training set can have it."""
Built = Mapping[str, Path]


def run(config: Config) -> None:
    """Write RUN/data, unless it is there already. Raises DataError naming the bad rows by file and line."""
    folder = Path(config.run_dir) / "data"
    if read_json(folder / "data.json"):
        print(f"data is there already: {folder}")
        return
    words = tokenizer(config)
    described = datasets.training(config.data)
    built = {name: tokenised(name, one, config, words) for name, one in described.items()}
    held = datasets.held_out(config.data)
    apart = {HELD_OUT: tokenised(HELD_OUT, held, config, words)} if held else {}
    sets, described = built | apart, described | ({HELD_OUT: held} if held else {})
    findings = _findings(sets, described)
    chosen = choose(built, apart, config, findings)
    about = _about(sets, described, {"train": list(built), VALIDATION: list(apart or built)}, chosen)
    rows = sum(one["rows"] for one in about["sets"].values())
    limits = config.data.gates
    if config.data.overlong is Overlong.split:  # nothing is lost
        limits = replace(limits, overlong=1.0)
    verdicts = gates.judged(findings, rows, limits)
    _judge(verdicts, about, rows, findings)
    _write(folder, sets, about, chosen, words, verdicts, config)


def _judge(verdicts: list[gates.Verdict], about: dict[str, Any], rows: int, findings: Findings) -> None:
    """Say what the gates found. Raises DataError with all that stops the run, or where a split is left without samples."""
    for verdict in verdicts:
        if not verdict.stops:
            print(f"warning   {verdict}", flush=True)
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


def _lost(findings: Findings) -> str:
    return "".join(f", {count:,} {gates.MEANINGS[gate]}" for gate, count in findings.counts.items())


def tokenised(name: str, one: DataSet, config: Config, words: PreTrainedTokenizerBase) -> Path:
    """The folder of a tokenised set: found in the cache, or built. Raises DataError for rows that cannot be read."""
    asked = config.data
    cache = Path(asked.cache) if asked.cache else Path(config.run_dir).parent / ".data"
    blocks = partial(sources.blocks, one.path, one.split, asked.max_rows)

    def unchanged() -> None:
        if identity.states(one.path) != before:
            said = "has changed while it was read: start again when nothing writes to it"
            raise DataError(Problem("data.path", one.path, said))

    first = list(islice(_readable(blocks()), TRIED))
    if not first and not any(True for block in blocks() for _ in block.parsed()):
        raise DataError(Problem("data.path", one.path, "has no rows"))
    shape = _shape(name, first, one) if first else one.format.name
    before = identity.states(one.path)
    key = identity.key(one, asked, words, shape, cache)
    if found := store.built(cache, key):
        print(f"tokens    {name}: there already, {found}", flush=True)
        return found
    recipe = Recipe(words, shape, one.fields, one.roles, asked.mask, asked.max_length, asked.overlong)
    recipe = _tried(recipe, first)
    size = sources.size(one.path)
    total = (size, "B") if size is not None else (len(sources.hub(one.path)), " rows")
    return store.build(cache, key, recipe, one.path, blocks, unchanged, workers=_workers(config), total=total)


def choose(built: Built, apart: Built, config: Config, findings: Findings) -> dict[str, Samples]:
    """The sample numbers of each split; what is found on the way is noted."""
    described = datasets.training(config.data)
    hashes, origins = ([samples.hashes(one, of) for one in built.values()] for of in ("hashes", "origins"))
    sets = Sets(np.concatenate(hashes), np.concatenate(origins), [0, *accumulate(map(len, hashes))])
    if apart:
        train, held_hashes = np.arange(len(sets.hashes)), samples.hashes(apart[HELD_OUT])
        held = np.arange(len(held_hashes))
    else:
        train, held = selection.held_out(sets, config.data.validation_fraction, config.data.seed)
    kept, doubles = selection.without_duplicates(train, sets.hashes)
    if config.data.drop_duplicates:
        train = kept
        print(f"dropped   {len(doubles):,} samples that are equal to one before", flush=True)
    else:
        located = [(one.path, folder) for one, folder in zip(described.values(), built.values(), strict=True)]
        places = _places(located, doubles[: gates.FIRST].tolist())
        findings.note("duplicates", places, len(doubles), of=len(train))
    if apart:
        common = selection.overlap(held_hashes, sets.hashes[train])
        located = [(str(config.data.validation_path), apart[HELD_OUT])]
        findings.note("overlap", _places(located, common[: gates.FIRST].tolist()), len(common), of=len(held))
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
        print(f"format    {name}: {shape}, because {why}", flush=True)
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
    difference = encode.same(recipe.tokenizer, found, mask=recipe.mask.name)
    ways = encode.Encoder(recipe.tokenizer, mask=recipe.mask.name, fast=difference is None).ways
    print(f"encoder   {ways}, compared on {len(found)} rows" + (f": {difference}" if difference else ""), flush=True)
    return replace(recipe, fast=difference is None)


def _workers(config: Config) -> int:
    if config.data.workers:
        return config.data.workers
    return (
        len(os.sched_getaffinity(0)) if config.cluster.executor is Executor.local else config.cluster.cpu.cpus_per_rank
    )


def _findings(built: Built, described: Mapping[str, DataSet]) -> Findings:
    """What the gates found when the sets were built; a set may have been built from the same rows at another place."""
    found = Findings()
    for name, one in built.items():
        about = read_json(one / "set.json")
        for examples in about["findings"]["first"].values():
            examples[:] = [
                (place.replace(about["path"], described[name].path, 1), detail) for place, detail in examples
            ]
        found.merge(Findings(**about["findings"]))
    return found


def _place(sets: Sequence[tuple[str, Path]], number: int) -> str:
    return _places(sets, [number])[0]


def _places(sets: Sequence[tuple[str, Path]], numbers: Sequence[int]) -> list[str]:
    """`file:line` of samples, numbered through these sets, each given with the path that it has now."""
    known = [read_json(one / "set.json") for _, one in sets]
    found, first = [], [0, *accumulate(about["samples"] for about in known)]
    for number in numbers:
        which = bisect_right(first, number) - 1
        (place,) = samples.places(sets[which][1], [number - first[which]])
        found.append(place.replace(known[which]["path"], sets[which][0], 1))
    return found


def _write(
    folder: Path,
    sets: Built,
    about: dict[str, Any],
    chosen: dict[str, Samples],
    words: PreTrainedTokenizerBase,
    verdicts: list[gates.Verdict],
    config: Config,
) -> None:
    """Publish RUN/data: the choice, links to the sets, the tokenizer, and the page to look at."""
    with new_folder(folder) as beside:
        (beside / "sets").mkdir()
        for name, one in sets.items():
            (beside / "sets" / name).symlink_to(os.path.relpath(one.resolve(), folder.parent.resolve() / "data/sets"))
        for split, numbers in chosen.items():
            np.save(beside / f"{split}.npy", numbers)
        words.save_pretrained(beside / "tokenizer")
        write_json(beside / "data.json", about)
        packed = config.data.packing
        splits = {
            "train": data.read(beside, "train", config.data.max_length if packed else None),
            VALIDATION: data.read(beside, VALIDATION),
        }
        places = {
            split: partial(_place, [(about["sets"][name]["source"], sets[name]) for name in about["splits"][split]])
            for split in splits
        }
        text = page.html(
            about,
            splits,
            places,
            words,
            max_length=config.data.max_length,
            packed=packed,
            found=verdicts,
            seed=config.data.seed,
        )
        write_text(beside / "preview.html", text)
        print(page.terminal(splits["train"], words, places["train"], count=config.data.preview, colour=True))
    print(f"data      {folder}, and what it looks like in preview.html", flush=True)


def _about(
    sets: Built, described: Mapping[str, DataSet], splits: dict[str, list[str]], chosen: dict[str, Samples]
) -> dict[str, Any]:
    """What RUN/data/data.json says: each set, and each split's sets and sizes."""
    about: dict[str, Any] = {"sets": {}, "splits": splits}
    for name, one in sets.items():
        known = read_json(one / "set.json")
        counts = {key: known[key] for key in ("rows", "samples", "tokens", "trained_tokens")}
        about["sets"][name] = {"source": described[name].path, "format": known["shape"], **counts, "epoch": 0}
    for split, numbers in chosen.items():
        found = samples.read([sets[name] for name in splits[split]])
        about[split] = {
            "samples": len(numbers),
            "tokens": int(found.lengths[numbers].sum()),
            "trained_tokens": int(found.labels[numbers].sum()),
        }
    ends = np.cumsum([about["sets"][name]["samples"] for name in splits["train"]])
    counts = np.bincount(np.searchsorted(ends, chosen["train"], side="right"), minlength=len(ends))
    for name, count in zip(splits["train"], counts.tolist(), strict=True):
        about["sets"][name]["epoch"] = count
    return about
