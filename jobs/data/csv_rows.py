"""Reads the rows of CSV and TSV files. The first record is the header."""

import csv
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

from conf.errors import DataError, Problem
from jobs.data.file_readers import MAX_ROW_LENGTH, Unreadable, as_text

OTHER_SEPARATORS = ";\t|"
"""Separators that spreadsheets write into .csv files where a comma is the decimal sign."""


def csv_rows(opened: BinaryIO, file: str, separator: str) -> Iterator[tuple[int, Any]]:
    """(first line, row) of each record. A header without a comma may show that a .csv file uses another separator."""
    csv.field_size_limit(MAX_ROW_LENGTH)
    with as_text(opened) as lines:
        first = next(lines, "")
        if separator == ",":
            separator = _separator(first)
        records = _records(csv.reader(chain([first], lines), delimiter=separator, strict=True), file)
        _, header = next(records, (1, []))
        if repeated := next((name for name in header if header.count(name) > 1), None):
            message = f"its header has the column {repeated!r} twice: rename or remove one of them"
            raise DataError(Problem("data.path", file, message))
        for line, record in records:
            if len(record) == len(header):
                yield line, dict(zip(header, record, strict=True))
            else:
                yield line, Unreadable(f"has {len(record)} columns, but the header has {len(header)}")


def _separator(header: str) -> str:
    """The separator of the columns that this first line names."""
    outside_quotes = re.sub(r'"[^"]*"', "", header)
    found = max(OTHER_SEPARATORS, key=outside_quotes.count)
    return found if found in outside_quotes and "," not in outside_quotes else ","


def _records(reader: Any, file: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, record) of each record that is not blank. `reader` is a csv.reader."""
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(Problem("data.path", f"{file}:{line}", f"is not valid CSV: {error}")) from error
