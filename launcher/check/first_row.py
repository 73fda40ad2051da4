"""Reads the columns of a training set's first row on the login node."""

import json
from dataclasses import dataclass
from pathlib import Path

from conf.columns import INPUT, INSTRUCTION, MESSAGES, OUTPUT
from launcher.check import inputs

FIRST_ROW_CHARACTERS = 2**20
"""Characters that are read of a file to see its columns: the file may be huge, and this runs on a login node."""
ROW_COLUMNS = {*MESSAGES, *INSTRUCTION, *INPUT, *OUTPUT}


@dataclass(frozen=True)
class FirstRow:
    """The columns of a training set's first row, or why they could not be read.

    Both are None for what is not read here: a Hub id, a folder, or a file other than JSON, JSONL, CSV and TSV.
    """

    key: str
    """Config key of the set's path, for example `data.path`."""
    columns: tuple[str, ...] | None = None
    error: str | None = None


def read(key: str, path: Path) -> FirstRow:
    """Read the columns of the first row of a JSON, JSONL, CSV or TSV file. Other files are left to the preprocess job."""
    if columns := inputs.csv_columns(path):
        return FirstRow(key, columns)
    if path.suffix not in (".json", ".jsonl", ".ndjson") or not path.is_file():
        return FirstRow(key)
    text = ""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:  # preprocess reports bytes that are not UTF-8
            text = file.read(FIRST_ROW_CHARACTERS).lstrip().removeprefix("[").lstrip()
        row = json.JSONDecoder().raw_decode(text)[0] if text and text != "]" else None
    except (json.JSONDecodeError, RecursionError) as error:
        if len(text) > FIRST_ROW_CHARACTERS // 2:  # the row may be longer than what was read
            return FirstRow(key)
        return FirstRow(key, error=f"the first row is not valid JSON ({error}). Write one JSON object per line")
    except OSError as error:
        return FirstRow(key, error=f"cannot be read ({error.strerror}). Check its permissions")
    if row is None:
        return FirstRow(key, error="has no rows. Write one JSON object per line")
    if not isinstance(row, dict):
        return FirstRow(key, error='the first row is not an object with named columns. Write rows like {"text": "..."}')
    if not ROW_COLUMNS & set(row) and any(
        isinstance(item, list) and item and isinstance(item[0], dict) for item in row.values()
    ):
        return FirstRow(key)  # the rows may lie in a list inside this object
    return FirstRow(key, columns=tuple(row))
