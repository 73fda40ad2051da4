"""Checks the training data that a config names: its files exist and its first rows have the columns of their format; pure."""

import difflib
import re
from collections.abc import Iterator

from conf.choices import Format
from conf.columns import COLUMNS as ALL_COLUMNS
from conf.columns import INPUT, INSTRUCTION, KEYS, MESSAGES, OUTPUT, ROLES, SPLIT
from conf.datasets import training, training_by_key
from conf.errors import Problem
from conf.schema import Config
from conf.schema_model import DataSet
from launcher.check.first_row import FirstRow
from launcher.check.observe import Facts

COLUMNS = {
    Format.alpaca: [{question, answer} for question in (*INSTRUCTION, *INPUT) for answer in OUTPUT],
    Format.sharegpt: [{name} for name in reversed(MESSAGES)],
    Format.messages: [{name} for name in MESSAGES],
    Format.prompt_completion: [{"prompt", answer} for answer in ("completion", *OUTPUT)],
    Format.segments: [{"segments"}],
    Format.text: [{"text"}],
    Format.tokenised: [{"input_ids"}],
}
"""The sets of columns that each format may have. Checked on the login node, so that a wrong file is refused before it queues."""


def problems(config: Config, facts: Facts) -> Iterator[Problem]:
    """Every problem with the training and validation data that can be seen before a job reads it."""
    for key, path in facts.files_missing:
        message = "no such file or folder in the working directory or in Muster's clone. Give the full path"
        yield Problem(key, path, message)
    if config.data.path is None and not config.data.sets:
        message = "training rows are missing. Set data.path=..., or data.sets.NAME.path=... for each of several sets"
        yield Problem("data.path", None, message)
    elif config.data.path is not None and config.data.sets:
        message = "cannot be used with data.sets. Use data=mix for several sets, or remove data.sets"
        yield Problem("data.path", config.data.path, message)
    else:
        yield from _names(config)
        yield from _splits(config)
        yield from _keys_of_one_path(config)
        yield from _held_out_rows(config)
        has_data = facts.inputs.run is not None and facts.inputs.run.has_data
        for key, data_set in training_by_key(config.data) if not has_data else ():
            yield from _names_of_columns_and_speakers(config, key.removesuffix(".path"), data_set)
        # `facts` has no rows where nothing was observed
        for first_row, data_set in zip(facts.first_rows, training(config.data).values(), strict=False):
            yield from _first_row(first_row, data_set)
            yield from _mapped_columns(config, first_row, data_set) if not has_data else ()


def _names(config: Config) -> Iterator[Problem]:
    for name in training(config.data):
        if not re.fullmatch(r"\w[\w.-]*", name):
            key = f"data.sets.{name}" if config.data.path is None else "data.name"
            message = "may contain only letters, digits, '.', '_' and '-', because a folder is named after it"
            yield Problem(key, name, message)


def _keys_of_one_path(config: Config) -> Iterator[Problem]:
    """Keys that say what to read at `data.path`, in a config that has `data.sets` instead."""
    for key in ("subset", "revision", "files", "split") if config.data.sets else ():
        if value := getattr(config.data, key):
            name = next(iter(config.data.sets))
            message = (
                f"belongs to data.path, which is not set. Set data.sets.{name}.{key} for each set that it is meant for"
            )
            yield Problem(f"data.{key}", value, message)
    if config.data.validation_split and not config.data.validation_path:
        message = "is a part of data.validation_path, which is not set. Set it: it may be the training file"
        yield Problem("data.validation_split", config.data.validation_split, message)


def _held_out_rows(config: Config) -> Iterator[Problem]:
    """Rows for validation that are the training rows: the gate `overlap` would stop preprocess."""
    data = config.data
    if not data.validation_path or data.gates.overlap == 1:
        return
    for key, data_set in training_by_key(data):
        if data_set.path == data.validation_path and data.validation_split in (None, data_set.split):
            message = f"holds rows of {key}, so the held-out loss would be that of training. Name another file, or take parts: "
            message += f"{key.removesuffix('.path')}.split=[:90%] data.validation_split=[90%:]"
            yield Problem("data.validation_path", data.validation_path, message)
            return


def _splits(config: Config) -> Iterator[Problem]:
    splits = {"data.split": config.data.split, "data.validation_split": config.data.validation_split}
    splits |= {f"data.sets.{name}.split": data_set.split for name, data_set in config.data.sets.items()}
    for key, split in splits.items():
        if split is not None and not SPLIT.fullmatch(split):
            yield Problem(key, split, "is not a range of rows. Write [:1000], [10%:] or [-100:]")
        elif split is not None and _is_empty(split):
            yield Problem(key, split, "holds no rows, because it ends before it begins. Write for example [:1000]")


def _is_empty(split: str) -> bool:
    """Whether a range ends where it begins, or before. Only bounds that are counted in the same way are compared."""
    start, _, end = split.strip("[]").partition(":")
    same = bool(end) and start.endswith("%") == end.endswith("%") and start.startswith("-") == end.startswith("-")
    return end in ("0", "0%") or (same and bool(start) and int(start.rstrip("%")) >= int(end.rstrip("%")))


def _names_of_columns_and_speakers(config: Config, section: str, data_set: DataSet) -> Iterator[Problem]:
    """Keys of `fields` that no format has, and values of `roles` that are no role."""
    for name in data_set.fields:
        if name not in ALL_COLUMNS | KEYS:
            near = difflib.get_close_matches(name, ALL_COLUMNS | KEYS, n=1, cutoff=0.6)
            hint = f": did you mean '{near[0]}'?" if near else "."
            message = f"no format has such a column{hint} Write {{column of the format: your column}}, as in {{output: answer}}"
            yield Problem(_key_of(config, section, data_set, "fields"), name, message)
    for speaker, role in data_set.roles.items():
        if role not in ROLES:
            message = "is no role. Use system, user, assistant or tool"
            yield Problem(f"{_key_of(config, section, data_set, 'roles')}.{speaker}", role, message)


def _mapped_columns(config: Config, first_row: FirstRow, data_set: DataSet) -> Iterator[Problem]:
    """Columns that `fields` names and the first row lacks, where such a row ends preprocess. A name with ? may be missing."""
    if first_row.columns is None or config.data.gates.unusable > 0:
        return
    for name, source in data_set.fields.items():
        is_column = name in ALL_COLUMNS and re.fullmatch(r"\w+", source)
        if is_column and source not in first_row.columns:
            message = (
                f"names the column {source}, but the first row of {data_set.path} has {', '.join(first_row.columns)}. "
            )
            message += f"Name one of these, or write '{source}?' if rows may lack it"
            key = _key_of(config, first_row.key.removesuffix(".path"), data_set, "fields")
            yield Problem(f"{key}.{name}", source, message)


def _key_of(config: Config, section: str, data_set: DataSet, name: str) -> str:
    """The key that a value of a set comes from: its own, or that of `data`."""
    inherited = getattr(data_set, name) == getattr(config.data, name)
    return f"data.{name}" if inherited else f"{section}.{name}"


def _first_row(first_row: FirstRow, data_set: DataSet) -> Iterator[Problem]:
    """Whether the first row of a set could be read, and has the columns of its format."""
    if first_row.error:
        yield Problem(first_row.key, data_set.path, first_row.error)
    if first_row.columns is None or data_set.fields:  # `fields` maps columns of any name
        return
    columns_left = [name for name in first_row.columns if name not in data_set.ignore]
    fixed = data_set.format not in (None, Format.auto)
    formats = [format for format in COLUMNS if not fixed or format is data_set.format]
    if not any(columns <= set(columns_left) for format in formats for columns in COLUMNS[format]):
        needed = "; ".join(f"{format.name} needs {' and '.join(sorted(COLUMNS[format][0]))}" for format in formats)
        without = " without those in data.ignore" if len(columns_left) < len(first_row.columns) else ""
        message = f"has the columns {', '.join(columns_left) or '(none)'}{without}, but {needed}. "
        message += "Map your columns, for example 'data.fields={output: answer}'"
        yield Problem(first_row.key, data_set.path, message)
