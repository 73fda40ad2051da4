"""The preprocess job: tokenizes the raw rows (once for all runs that need the same tokens), and chooses the samples of this run."""

import gc
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from conf import datasets
from conf.choices import Overlong
from conf.errors import DataError, Problem
from conf.files import new_folder, read_json, write_json, write_text
from conf.schema import Config
from jobs.data import batches, quality_gates, splits, token_dataset, tokenized_set
from jobs.data.quality_gates import Findings
from jobs.data.splits import SampleNumbers
from jobs.data.tokenized_set import TokenizedSet
from jobs.report import data_preview
from jobs.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
HELD_OUT = "held out"
"""Name of the set at `data.validation_path`. No training set can have this name."""

Sets = Mapping[str, TokenizedSet]


def run(config: Config) -> None:
    """Write RUN/data, unless it exists already. Raises DataError naming the bad rows by file and line."""
    folder = Path(config.run_dir) / "data"
    if read_json(folder / "data.json"):
        log.info(f"data      already exists: {folder}")
        return
    tokenizer = load_tokenizer(config)
    gc.freeze()  # keeps everything loaded so far out of garbage collection, which took an eighth of the whole time

    training = {
        name: tokenized_set.find_or_build(name, dataset, config, tokenizer)
        for name, dataset in datasets.training(config.data).items()
    }
    dataset = datasets.held_out(config.data)
    held_out = {HELD_OUT: tokenized_set.find_or_build(HELD_OUT, dataset, config, tokenizer)} if dataset else {}
    sets = training | held_out
    set_names = {TRAIN: list(training), VALIDATION: list(held_out or training)}

    findings = _collect_findings(sets)
    chosen = choose_samples(training, held_out, config, findings)
    training_tokens = token_dataset.open_sets([item.folder for item in training.values()])
    held_out_tokens = (
        token_dataset.open_sets([item.folder for item in held_out.values()]) if held_out else training_tokens
    )
    pack_into = config.data.max_length if config.data.packing else None
    rows = {
        TRAIN: batches.make_rows(training_tokens, chosen[TRAIN], pack_into),
        VALIDATION: batches.make_rows(held_out_tokens, chosen[VALIDATION]),
    }
    description = _describe(sets, set_names, rows)
    verdicts = _apply_gates(findings, description, config)
    _write(folder, sets, description, rows, tokenizer, verdicts, config)


def choose_samples(training: Sets, held_out: Sets, config: Config, findings: Findings) -> dict[str, SampleNumbers]:
    """The sample numbers of each split. Adds duplicates and overlap to `findings`."""
    folders = [item.folder for item in training.values()]
    hashes, origins = ([token_dataset.load_hashes(path, kind) for path in folders] for kind in ("hashes", "origins"))
    first = [0, *accumulate(map(len, hashes))]
    sets = splits.TrainingSets(np.concatenate(hashes), np.concatenate(origins), first)
    if held_out:
        held_out_hashes = token_dataset.load_hashes(held_out[HELD_OUT].folder)
        train, validation = np.arange(len(sets.hashes)), np.arange(len(held_out_hashes))
    else:
        train, validation = splits.split_held_out(sets, config.data.validation_fraction, config.data.seed)

    kept, duplicates = splits.split_duplicates(train, sets.hashes)
    if config.data.drop_duplicates:
        train = kept
        log.info(f"dropped   {len(duplicates):,} samples that are equal to an earlier one")
    else:
        locations = _locations(training.values(), duplicates)
        findings.add_many("duplicates", locations, len(duplicates), checked=len(train))
    if held_out:
        overlap = splits.find_overlap(held_out_hashes, sets.hashes[train])
        locations = _locations(held_out.values(), overlap)
        findings.add_many("overlap", locations, len(overlap), checked=len(validation))

    train = splits.apply_weights(train, sets, datasets.training(config.data), config.data.seed)
    return {TRAIN: train, VALIDATION: validation}


def _collect_findings(sets: Sets) -> Findings:
    """What the gates found when the sets were built, with the locations under this run's paths."""
    findings = Findings()
    for item in sets.values():
        saved = Findings(**item.description["findings"])
        first = {
            gate: [(item.localize(location), detail) for location, detail in rows] for gate, rows in saved.first.items()
        }
        findings.merge(Findings(saved.counts, first))
    return findings


def _apply_gates(findings: Findings, description: dict[str, Any], config: Config) -> list[quality_gates.Verdict]:
    """The verdicts of the gates; those that do not stop the run are logged as warnings.

    Raises DataError with all verdicts that stop the run, or if a split has no samples.
    """
    rows = sum(item["rows"] for item in description["sets"].values())
    limits = config.data.gates
    if config.data.overlong is Overlong.split:  # splitting loses no tokens
        limits = replace(limits, overlong=1.0)
    verdicts = quality_gates.judge(findings, rows, limits)
    for verdict in verdicts:
        if not verdict.stops:
            log.warning(f"{verdict}")
    if problems := [verdict.problem for verdict in verdicts if verdict.stops]:
        raise DataError(*problems)
    for split in description["splits"]:
        if not description[split]["samples"]:
            counts = (f", {count:,} {quality_gates.MEANINGS[gate]}" for gate, count in findings.counts.items())
            raise DataError(
                Problem(
                    "data.path",
                    ", ".join(item["source"] for item in description["sets"].values()),
                    f"leaves no samples for {split}: {rows:,} rows{''.join(counts)}; see data.max_length, data.overlong, "
                    "data.validation_fraction and the weights of data.sets",
                )
            )
    return verdicts


def _locations(sets: Iterable[TokenizedSet], numbers: SampleNumbers) -> list[str]:
    """Locations of the first few of these samples, as many as a message lists."""
    return [_location(sets, number) for number in numbers[: quality_gates.MAX_LISTED].tolist()]


def _location(sets: Iterable[TokenizedSet], number: int) -> str:
    """`file:line` of a sample; samples are numbered from 0 across these sets."""
    for item in sets:
        if number < item.description["samples"]:
            return item.localize(*token_dataset.row_locations(item.folder, [number]))
        number -= item.description["samples"]
    raise IndexError(number)


def _describe(sets: Sets, set_names: dict[str, list[str]], rows: dict[str, batches.Rows]) -> dict[str, Any]:
    """The content of RUN/data/data.json: the sets, the names of the sets in each split, and the size of each split."""
    description: dict[str, Any] = {"sets": {}, "splits": set_names}
    for name, item in sets.items():
        counts = {key: item.description[key] for key in ("rows", "samples", "tokens", "trained_tokens")}
        description["sets"][name] = {"source": item.path, "format": item.description["shape"], **counts, "epoch": 0}
    for split, split_rows in rows.items():
        description[split] = {
            "samples": len(split_rows.chosen),
            "tokens": int(split_rows.lengths.sum()),
            "trained_tokens": int(split_rows.label_counts.sum()),
        }
    ends = np.cumsum([sets[name].description["samples"] for name in set_names[TRAIN]])
    set_of_sample = np.searchsorted(ends, rows[TRAIN].chosen, side="right")
    per_epoch = np.bincount(set_of_sample, minlength=len(ends)).tolist()
    for name, count in zip(set_names[TRAIN], per_epoch, strict=True):
        description["sets"][name]["epoch"] = count
    return description


def _write(
    folder: Path,
    sets: Sets,
    description: dict[str, Any],
    rows: dict[str, batches.Rows],
    tokenizer: PreTrainedTokenizerBase,
    verdicts: list[quality_gates.Verdict],
    config: Config,
) -> None:
    """Publish RUN/data: the chosen samples, links to the sets, the tokenizer, and a preview page."""
    locate: dict[str, Callable[[int], str]] = {
        split: partial(_location, [sets[name] for name in names]) for split, names in description["splits"].items()
    }
    with new_folder(folder) as temporary:
        (temporary / "sets").mkdir()
        for name, item in sets.items():
            target = os.path.relpath(item.folder.resolve(), folder.parent.resolve() / "data/sets")
            (temporary / "sets" / name).symlink_to(target)
        for split, split_rows in rows.items():
            np.save(temporary / f"{split}.npy", split_rows.chosen)
        tokenizer.save_pretrained(temporary / "tokenizer")
        write_json(temporary / "data.json", description)
        page = data_preview.render_html(
            description,
            rows,
            locate,
            tokenizer,
            max_length=config.data.max_length,
            packed=config.data.packing,
            verdicts=verdicts,
            seed=config.data.seed,
        )
        write_text(temporary / "preview.html", page)
        samples = data_preview.render_terminal(
            rows[TRAIN], tokenizer, locate[TRAIN], count=config.data.preview, color=True
        )
        log.info(samples)
    log.info(f"data      {folder}; see preview.html in it")
