"""Finds or builds the tokenized set of one data source: detects its format, checks the fast encoder, computes the cache key."""

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from conf.choices import Executor, Format
from conf.errors import DataError, Problem
from conf.files import read_json
from conf.node_paths import expanded
from conf.schema import Config
from conf.schema_model import DataSet
from jobs.data import cache, cache_key, cache_trust, formats, sources
from jobs.data.file_readers import Unreadable
from jobs.data.tokenize import TokenizeSettings
from jobs.tokenization import encoder
from jobs.tokenization.chat_settings import ChatSettings
from jobs.tokenization.comparison import samples_to_compare

log = logging.getLogger(__name__)

FIRST_ROWS, FIRST_BYTES = 300, 2**25
"""Rows that are read before all others: they show the format, and the encoder's fast ways are compared with the slow one on some
of them. They end with the block at this byte, because rows can be long."""


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
    folder = Path(expanded(data.cache, "data.cache")) if data.cache else Path(config.run_dir).parent / ".data"
    cache_trust.check(folder)
    read_blocks = partial(sources.read_blocks, dataset, data.max_rows)
    first_rows = _first_rows(read_blocks())
    if not first_rows and not any(True for block in read_blocks() for _ in block.parsed()):
        raise DataError(Problem("data.path", dataset.path, "has no rows"))
    format_name = _format_name(name, first_rows, dataset)
    _log_unused_columns(name, first_rows, format_name, dataset)
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
        tokenizer=tokenizer,
        format=format_name,
        fields=dataset.fields,
        roles=dataset.roles,
        chat=ChatSettings.of(data),
        max_length=data.max_length,
        overlong=data.overlong,
        ignore=tuple(dataset.ignore),
        split_thinking=data.split_thinking,
    )
    settings = _check_fast_encoder(settings, first_rows)
    total = sources.total_size(dataset)
    workers = _worker_count(config)
    path = cache.build(folder, key, settings, dataset.path, read_blocks, check_unchanged, workers=workers, total=total)
    return TokenizedSet(dataset.path, path, read_json(path / "set.json"))


def _first_rows(blocks: Iterator[sources.Block]) -> list[tuple[str, sources.Row]]:
    """(location, row) of the first rows that can be read; none only if no row can be read at all."""
    rows: list[tuple[str, sources.Row]] = []
    for block in blocks:
        for number, row in block.parsed():
            if not isinstance(row, Unreadable):
                rows.append((f"{block.location}{number}", row))
                if len(rows) == FIRST_ROWS:
                    return rows
        if rows and block.read >= FIRST_BYTES:
            break
    return rows


def _format_name(name: str, rows: list[tuple[str, sources.Row]], dataset: DataSet) -> str:
    """data.format, or for `auto` the format of the first of these rows that fits one. Logs the reason."""
    assert dataset.format is not None  # conf.datasets fills it in
    try:
        formats.check_fields([row for _, row in rows], dataset.fields, dataset.ignore)
    except ValueError as error:
        raise DataError(Problem("data.fields", None, f"{error} (set {name})")) from error
    if not rows or dataset.format is not Format.auto:
        return dataset.format.name
    problems = []
    for location, row in rows:
        try:
            format_name, reason = formats.detect_format(row, dataset.fields, dataset.ignore)
        except ValueError as error:
            problems.append(Problem("data.format", "auto", f"{error} ({location})"))
            continue
        log.info(f"format    {name}: {format_name}, because {reason}")
        return format_name
    raise DataError(problems[0])


def _log_unused_columns(name: str, rows: list[tuple[str, sources.Row]], format_name: str, dataset: DataSet) -> None:
    """Log the columns of these rows that nothing reads, so that none is left out without a word."""
    unused: dict[str, None] = {}
    for _, row in rows:
        with suppress(ValueError):  # the quality gates report such rows later
            unused |= dict.fromkeys(formats.unused_columns(row, format_name, dataset.fields, dataset.ignore))
    if unused:
        log.info(f"columns   {name}: not used: {', '.join(unused)}")


def _check_fast_encoder(settings: TokenizeSettings, rows: list[tuple[str, sources.Row]]) -> TokenizeSettings:
    """The settings with `fast` set to whether the encoder's fast and slow ways agree on these rows, as far as they are compared."""
    samples = []
    for _, row in rows:
        try:
            samples.append(settings.convert(row))
        except ValueError:
            continue  # the quality gates report such rows later
    samples = samples_to_compare(samples)
    difference = encoder.first_difference(settings.tokenizer, samples, settings=settings.chat)
    description = encoder.Encoder(settings.tokenizer, settings=settings.chat, fast=difference is None).description
    log.info(f"encoder   {description}, compared on {len(samples)} rows" + (f": {difference}" if difference else ""))
    return replace(settings, fast=difference is None)


def _worker_count(config: Config) -> int:
    if config.data.workers:
        return config.data.workers
    if config.cluster.executor is Executor.local:
        return len(os.sched_getaffinity(0))
    return config.cluster.cpu.cpus_per_rank
