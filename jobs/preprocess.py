"""The preprocess job: tokenizes the raw rows (once for all runs that need the same tokens), and chooses the samples of this run."""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from conf import datasets
from conf.choices import Overlong
from conf.errors import DataError, Problem
from conf.files import new_folder, read_json, write_json, write_text
from conf.plural import plural
from conf.schema import Config
from jobs.data import batches, chosen_samples, quality_gates, token_dataset, tokenized_set
from jobs.data.chosen_samples import Chosen
from jobs.data.quality_gates import ROWS_PER_REASON, Findings
from jobs.data.splits import SampleNumbers
from jobs.data.tokenized_set import TokenizedSet
from jobs.distributed.logs import SHOWN
from jobs.report import data_preview, sample_records, terminal
from jobs.report.sample_records import FoundRow, SetSamples
from jobs.report.token_view import Decoder
from jobs.tokenization.tokenizer import load_tokenizer
from pages import run_facts

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
HELD_OUT = "held out"
"""Name of the set at `data.validation_path`. No training set can have this name."""

MOST_PARTS = 20
"""Parts of a split row that the preview shows at most."""

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
    chosen = chosen_samples.choose(training, held_out.get(HELD_OUT), config.data)
    for gate, numbers, where, checked in (
        ("duplicates", chosen.duplicates, training, chosen.compared),
        ("overlap", chosen.overlap, held_out, len(chosen.validation)),
    ):
        locations = [_location(where.values(), number) for number in numbers[:ROWS_PER_REASON].tolist()]
        findings.add_many(gate, locations, len(numbers), checked=checked)
    training_tokens = token_dataset.open_sets([item.folder for item in training.values()])
    held_out_tokens = (
        token_dataset.open_sets([item.folder for item in held_out.values()]) if held_out else training_tokens
    )
    pack_into = config.data.max_length if config.data.packing else None
    rows = {
        TRAIN: batches.make_rows(training_tokens, chosen.train, pack_into),
        VALIDATION: batches.make_rows(held_out_tokens, chosen.validation),
    }
    description = _describe(sets, set_names, rows)
    verdicts = _apply_gates(findings, description, config)
    _check_splits(findings, chosen, description, config)
    previewed = _previewed_sets(sets, set_names, rows, chosen)
    _write(folder, sets, description, rows, tokenizer, verdicts, previewed, config)


def _collect_findings(sets: Sets) -> Findings:
    """What the gates found when the sets were built, with the locations under this run's paths."""
    findings = Findings()
    for item in sets.values():
        findings.merge(Findings.from_json(item.description["findings"]).with_locations(item.localize))
    return findings


def _apply_gates(findings: Findings, description: dict[str, Any], config: Config) -> list[quality_gates.Verdict]:
    """The verdicts of the gates; those that do not stop the run are logged as warnings.

    Raises DataError with all verdicts that stop the run.
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
    return verdicts


def _check_splits(findings: Findings, chosen: Chosen, description: dict[str, Any], config: Config) -> None:
    """Raise DataError if a split has no samples, unless nothing is to be held out."""
    fraction = config.data.validation_fraction
    for split, names in description["splits"].items():
        if description[split]["samples"]:
            continue
        if split == VALIDATION and HELD_OUT not in names and not fraction:
            log.info("held out  nothing, because data.validation_fraction=0: there will be no held-out loss")
            continue
        if split == TRAIN and chosen.all_held_out:
            count = len(chosen.validation)
            rows = "the only row" if count == 1 else f"all {count:,} samples (they are equal, or parts of one row)"
            message = (
                f"holds out {rows}, so none is left to train on. Use data.validation_fraction=0 to hold out nothing"
            )
            raise DataError(Problem("data.validation_fraction", fraction, message))
        raise DataError(_no_samples(split, {name: description["sets"][name] for name in names}, findings, config))


def _no_samples(split: str, sets: dict[str, dict[str, Any]], findings: Findings, config: Config) -> Problem:
    """Why no row of these sets is in a split. sets: their entries in data.json."""
    source, rows = ", ".join(item["source"] for item in sets.values()), sum(item["rows"] for item in sets.values())
    key = "data.validation_path" if HELD_OUT in sets else "data.path" if config.data.path else "data.sets"
    if any(item["samples"] for item in sets.values()):
        reason = "data.sets.NAME.weight rounds to no row of any set: raise it, or set data.sets.NAME.num_samples"
    else:
        found = [f"{count:,} {quality_gates.MEANINGS[gate]}" for gate, count in findings.counts.items()]
        reason = f"no row can be used ({', '.join(found)}): fix the rows"
        if "overlong" in findings.counts:
            reason += ", or raise data.max_length, or use data.overlong=truncate or data.overlong=split"
    return Problem(key, source, f"leaves no samples for {split} of {plural(rows, 'row')}: {reason}")


def _previewed_sets(
    sets: Sets, set_names: dict[str, list[str]], rows: dict[str, batches.Rows], chosen: Chosen
) -> list[SetSamples]:
    """What the preview shows of each set: its samples, and the rows that the gates list."""
    previewed = list[SetSamples]()
    for split in (TRAIN, VALIDATION):
        begin = 0
        for name in set_names[split]:
            item, end = sets[name], begin + sets[name].description["samples"]
            if all(one.name != name for one in previewed):
                uses = {key: rows[key].chosen for key, names in set_names.items() if name in names}
                repeated = {"overlap": chosen.overlap} if name == HELD_OUT else {"duplicates": chosen.duplicates}
                numbers, locate = range(begin, end), partial(_location, [sets[key] for key in set_names[split]])
                found = [*_found_rows(item, begin), *_repeated_rows(repeated, numbers, locate)]
                count = item.description["rows"]
                previewed.append(SetSamples(name, count, rows[split].samples, numbers, locate, uses, found))
            begin = end
    return previewed


def _found_rows(item: TokenizedSet, first: int) -> Iterator[FoundRow]:
    """The rows of a set that the gates list. `first`: number of the set's first sample."""
    findings = Findings.from_json(item.description["findings"])
    listed = [
        (gate, *row)
        for gate, reasons in findings.reasons.items()
        for reason in list(reasons.values())[: quality_gates.MAX_LISTED]
        for row in reason.rows
    ]
    samples = token_dataset.samples_at(item.folder, [location for _, location, _ in listed])
    for gate, location, detail in listed:
        numbers = [first + number for number in samples.get(location, ())[:MOST_PARTS]]
        yield FoundRow(gate, item.localize(location), detail or quality_gates.MEANINGS[gate], numbers)


def _repeated_rows(
    repeated: dict[str, SampleNumbers], numbers: range, locate: Callable[[int], str]
) -> Iterator[FoundRow]:
    for gate, found in repeated.items():
        inside = found[(found >= numbers.start) & (found < numbers.stop)]
        for number in inside[:ROWS_PER_REASON].tolist():
            yield FoundRow(gate, locate(number), quality_gates.MEANINGS[gate], [number])


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
    previewed: list[SetSamples],
    config: Config,
) -> None:
    """Publish RUN/data: the chosen samples, links to the sets, the tokenizer, and the previews."""
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
            limits=config.data.gates,
            name=config.name,
            about=run_facts.model(config),
            seed=config.data.seed,
        )
        write_text(temporary / "preview.html", page)
        lines = sample_records.render_jsonl(previewed, Decoder(tokenizer), config.data.seed)
        write_text(temporary / "preview.jsonl", lines)
        color = terminal.supports_color(sys.stdout)
        samples = data_preview.render_terminal(
            rows[TRAIN], tokenizer, locate[TRAIN], count=config.data.preview, color=color
        )
        log.info(samples, extra=SHOWN)
    log.info(f"data      {folder}; see preview.html and preview.jsonl in it")
