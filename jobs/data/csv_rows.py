"""Reads the rows of CSV and TSV files. The first record is the header."""

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from conf.errors import DataError, Problem
from jobs.data.file_readers import MAX_ROW_LENGTH, Unreadable, as_text

OTHER_SEPARATORS = ";\t|"
"""Separators that spreadsheets write into .csv files where a comma is the decimal sign."""


def csv_rows(opened: BinaryIO, file: str, separator: str) -> Iterator[tuple[int, Any]]:
    """(first line, row) of each record. A header without `separator` may show that the file uses another one."""
    csv.field_size_limit(MAX_ROW_LENGTH)
    with as_text(opened) as lines:
        # the first record, as lines: a quoted name may hold line ends
        header_lines: list[str] = []
        header = next(csv.reader(_kept(lines, header_lines), delimiter=separator), [])
        if len(header) == 1 and separator == ",":
            separator = max(OTHER_SEPARATORS, key=header[0].count)
            separator = separator if separator in header[0] else ","
            header = next(csv.reader(header_lines, delimiter=separator), [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            message = f"its header has the column {repeated[0]!r} twice: rename or remove one of them"
            raise DataError(Problem("data.path", file, message))
        before = len(header_lines)
        for line, record in _records(csv.reader(lines, delimiter=separator, strict=True), file, before):
            if len(record) == len(header):
                yield line, dict(zip(header, record, strict=True))
            else:
                yield line, Unreadable(f"has {len(record)} columns, but the header has {len(header)}")


def _kept(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    """The lines, each also added to `kept`."""
    for line in lines:
        kept.append(line)
        yield line


def _records(reader: Any, file: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """(first line, record) of each record that is not blank. `reader` is a csv.reader that starts `before` lines into the file."""
    line = before + 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = before + int(reader.line_num) + 1
    except csv.Error as error:
        raise DataError(Problem("data.path", f"{file}:{line}", f"is not valid CSV: {error}")) from error
