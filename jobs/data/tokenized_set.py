"""Finds or builds the tokenized set of one data source: detects its format, checks the fast encoder, computes the cache key."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from conf.choices import Executor, Format
from conf.errors import DataError, Problem
from conf.files import read_json
from conf.schema import Config, DataSet
from jobs.data import cache, cache_key, formats, sources
from jobs.data.file_readers import Unreadable
from jobs.data.tokenize import TokenizeSettings
from jobs.tokenization import encoder

log = logging.getLogger(__name__)

COMPARED_ROWS = 300
"""Rows on which the fast paths of the encoder are compared with the slow path before they are used."""


@dataclass(frozen=True)
class TokenizedSet:
    """A tokenized set in the cache, and the path that this run gave for its rows.

    The paths differ if another run built the set from the same rows in another place.
    """

    path: str
    folder: Path
    description: dict[str, Any]
    """The content of its set.json."""

    def localize(self, location: str) -> str:
        """The location of a row (`file:line`) under this run's path."""
        return location.replace(self.description["path"], self.path, 1)


def find_or_build(name: str, dataset: DataSet, config: Config, tokenizer: PreTrainedTokenizerBase) -> TokenizedSet:
    """The tokenized set of a data source, from the cache or built now. Raises DataError if the source cannot be read."""
    data = config.data
    folder = Path(data.cache) if data.cache else Path(config.run_dir).parent / ".data"
    read_blocks = partial(sources.read_blocks, dataset, data.max_rows)
    first_rows = list(islice(_readable_rows(read_blocks()), COMPARED_ROWS))
    if not first_rows and not any(True for block in read_blocks() for _ in block.parsed()):
        raise DataError(Problem("data.path", dataset.path, "has no rows"))
    format_name = _format_name(name, first_rows, dataset)
    states = cache_key.file_states(dataset)
    key = cache_key.compute_key(dataset, data, tokenizer, format_name, folder)
    if path := cache.find(folder, key):
        log.info(f"tokens    {name}: already in the cache, {path}")
        return TokenizedSet(dataset.path, path, read_json(path / "set.json"))

    def check_unchanged() -> None:
        if cache_key.file_states(dataset) != states:
            message = "changed while it was read: start again when no process writes to it"
            raise DataError(Problem("data.path", dataset.path, message))

    settings = TokenizeSettings(
        tokenizer, format_name, dataset.fields, dataset.roles, data.mask, data.max_length, data.overlong
    )
    settings = _check_fast_encoder(settings, first_rows)
    total = sources.total_size(dataset)
    workers = _worker_count(config)
    path = cache.build(folder, key, settings, dataset.path, read_blocks, check_unchanged, workers=workers, total=total)
    return TokenizedSet(dataset.path, path, read_json(path / "set.json"))


def _readable_rows(blocks: Iterator[sources.Block]) -> Iterator[tuple[str, sources.Row]]:
    """(location, row) of every row that can be read."""
    for block in blocks:
        for number, row in block.parsed():
            if not isinstance(row, Unreadable):
                yield f"{block.location}{number}", row


def _format_name(name: str, rows: list[tuple[str, sources.Row]], dataset: DataSet) -> str:
    """data.format, or for `auto` the format of the first of these rows that fits one. Logs the reason."""
    assert dataset.format is not None  # conf.datasets fills it in
    if not rows or dataset.format is not Format.auto:
        return dataset.format.name
    problems = []
    for location, row in rows:
        try:
            format_name, reason = formats.detect_format(row, dataset.fields)
        except ValueError as error:
            problems.append(Problem("data.format", "auto", f"{error} ({location})"))
            continue
        log.info(f"format    {name}: {format_name}, because {reason}")
        return format_name
    raise DataError(problems[0])


def _check_fast_encoder(settings: TokenizeSettings, rows: list[tuple[str, sources.Row]]) -> TokenizeSettings:
    """The settings with `fast` set to whether the encoder's fast and slow paths agree on all of these rows."""
    samples = []
    for _, row in rows:
        try:
            samples.append(formats.convert(row, settings.format, settings.fields, settings.roles))
        except ValueError:
            continue  # the quality gates report such rows later
    difference = encoder.first_difference(settings.tokenizer, samples, mask=settings.mask.name)
    description = encoder.Encoder(settings.tokenizer, mask=settings.mask.name, fast=difference is None).description
    log.info(f"encoder   {description}, compared on {len(samples)} rows" + (f": {difference}" if difference else ""))
    return replace(settings, fast=difference is None)


def _worker_count(config: Config) -> int:
    if config.data.workers:
        return config.data.workers
    if config.cluster.executor is Executor.local:
        return len(os.sched_getaffinity(0))
    return config.cluster.cpu.cpus_per_rank
