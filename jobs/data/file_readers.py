"""Reads the rows of one file whose rows are not lines: a JSON array, CSV, TSV, Parquet or Arrow. Each row comes with its number."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from conf.errors import DataError, Problem

CHUNK = 2**20
"""How much is read at a time: characters of a JSON array, or bytes of a file of lines."""
MAX_ROW_LENGTH = 2**28
"""Most characters or bytes of one row. Without this limit, a file without line ends would fill the memory."""
BLOCK_ROWS = 256
"""Rows in a block of a file that is not read by lines."""
NEAR_END = 64
"""A JSON error this close (in characters) to the end of the text read so far may come from a value cut in two (`tru`, `1e`,
`\\u12`): the reader then reads on and tries again."""
WHITESPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class Unreadable(ValueError):
    """A line or record that is not a row; the message says why."""


class _JsonReader:
    """Decodes a JSON file value by value. Keeps the text that is not decoded yet, and the line where it begins."""

    def __init__(self, source: IO[str], file: Path) -> None:
        self._source, self._file = source, file
        self._text, self._position, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character after whitespace, without consuming it; "" at the end of the file."""
        while True:
            blank = WHITESPACE.match(self._text, self._position)
            assert blank is not None  # the pattern matches the empty text too
            self._advance(blank.end())
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def skip(self) -> None:
        """Consume the character that `peek` returned."""
        self._position += 1

    def value(self) -> Any:
        """Decode the next value, which may extend over many chunks."""
        while True:
            try:
                row, end = DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if not (self._may_be_cut(error) and self._read_more()):
                    raise self.error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.error("nested too deeply") from error
            except ValueError as error:  # Python limits the digits of a number
                raise self.error(str(error)) from error
            else:
                if len(self._text) - end < NEAR_END and self._read_more():
                    continue  # a number may have more digits in the next chunk
                self._advance(end)
                return row

    def error(self, reason: str, position: int | None = None) -> DataError:
        """The error to raise. It names the line of `position`, or else the line of the next character."""
        line = self.line + self._text.count("\n", self._position, self._position if position is None else position)
        return DataError(Problem("data.path", f"{self._file}:{line}", f"is not valid JSON: {reason}"))

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may only mean that the rest of the value is not read yet."""
        return error.msg.startswith("Unterminated string") or len(self._text[error.pos :].strip()) <= NEAR_END

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._position, end)
        self._position = end

    def _read_more(self) -> bool:
        """Read another chunk. False at the end of the file, and if the current row is longer than MAX_ROW_LENGTH."""
        rest = len(self._text) - self._position
        # at least as much as is left: a long row is then decoded again only after its text has doubled
        chunk = self._source.read(max(CHUNK, rest)) if rest < MAX_ROW_LENGTH else ""
        if chunk:
            self._text, self._position = self._text[self._position :] + chunk, 0
        return bool(chunk)


@contextmanager
def _as_text(opened: BinaryIO) -> Iterator[IO[str]]:
    """The file as UTF-8 text. The file itself stays open, because the caller asks for its position."""
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    try:
        yield text
    finally:
        with suppress(ValueError):  # the file is closed already if the caller read only some rows
            text.detach()


def _json_arrays(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """The items of one array, or of several in sequence (`cat a.json b.json`), decoded while the file is read."""
    with _as_text(opened) as source:
        reader = _JsonReader(source, file)
        while character := reader.peek():
            if character != "[":
                raise reader.error("only another array may follow the end of an array")
            reader.skip()
            yield from _array_items(reader)


def _array_items(reader: _JsonReader) -> Iterator[tuple[int, Any]]:
    """(line, item) of each item of an array; consumes the closing bracket too."""
    first = True
    while (character := reader.peek()) != "]":
        if character and not first:
            if character != ",":
                raise reader.error("a comma is missing between two rows")
            reader.skip()
            character = reader.peek()
        if not character:
            raise reader.error("the array does not end")
        line, first = reader.line, False
        yield line, reader.value()
    reader.skip()


def _csv(opened: BinaryIO, file: Path, dialect: str) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV file whose first record is the header."""
    csv.field_size_limit(MAX_ROW_LENGTH)
    with _as_text(opened) as lines:
        records = _csv_records(csv.reader(lines, dialect, strict=True), file)
        _, header = next(records, (1, []))
        for line, record in records:
            if len(record) == len(header):
                yield line, dict(zip(header, record, strict=True))
            else:
                yield line, Unreadable(f"has {len(record)} columns, but the header has {len(header)}")


def _csv_records(reader: Any, file: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, record) of each record that is not blank. `reader` is a csv.reader."""
    line = 1
    try:
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(Problem("data.path", f"{file}:{line}", f"is not valid CSV: {error}")) from error


def _parquet(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as parquet

    def batches() -> Any:
        # Without these two options memory grows with the row group, which may be the whole file.
        return parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20).iter_batches(batch_size=BLOCK_ROWS)

    yield from _arrow_rows(file, batches)


def _arrow(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of an Arrow file, or of the Arrow stream format that `datasets` writes."""
    import pyarrow as arrow

    def batches() -> Any:
        try:
            reader = arrow.ipc.open_file(opened)
            return (reader.get_batch(number) for number in range(reader.num_record_batches))
        except arrow.ArrowInvalid:
            opened.seek(0)
            return arrow.ipc.open_stream(opened)

    yield from _arrow_rows(file, batches)


def _arrow_rows(file: Path, open_batches: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    """(number, row) of all record batches, numbered from 1."""
    import pyarrow as arrow

    try:
        yield from enumerate((row for batch in open_batches() for row in batch.to_pylist()), 1)
    except (arrow.ArrowException, OSError) as error:
        message = f"is damaged, or its content does not match its file ending: {error}"
        raise DataError(Problem("data.path", file, message)) from error


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[tuple[int, Any]]]] = {
    ".json": _json_arrays,
    ".csv": partial(_csv, dialect="excel"),
    ".tsv": partial(_csv, dialect="excel-tab"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""By file ending, a function that reads an opened file and yields (number, row), or (number, Unreadable) for a broken row.

The number is the line where the row begins, or for Parquet and Arrow the row number from 1."""
