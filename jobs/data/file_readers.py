"""Reads the rows of one file that has no lines to cut it at, each with its number: a JSON array, CSV, Parquet, Arrow."""

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
"""Characters of a JSON array, or bytes of whole lines, that are read at a time."""
LONGEST = 2**28
"""Characters or bytes of one row: a file without ends must not fill the memory."""
ROWS = 256
"""Rows of a block, where a file has no lines to cut it at."""
NEAR = 64
"""Characters before the end of what was read: an error there may be that of a row cut in two (`tru`, `1e`, `\\u12`)."""
BLANKS = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class Unreadable(ValueError):
    """A line that holds no row."""


class _Json:
    """A file of JSON as it is read: what is not decoded yet, and the line where that begins."""

    def __init__(self, source: IO[str], file: Path) -> None:
        self._source, self._file = source, file
        self._text, self._at, self.line = "", 0, 1

    def sign(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            found = BLANKS.match(self._text, self._at)
            assert found is not None  # it matches the empty text
            self._pass(found.end())
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def step(self) -> None:
        """Over the sign."""
        self._at += 1

    def item(self) -> Any:
        """The next value, however many chunks it is long."""
        while True:
            try:
                row, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not (self._cut(error) and self._more()):
                    raise self.wrong(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.wrong("nested too deeply") from error
            except ValueError as error:  # Python's limit on the digits of a number
                raise self.wrong(str(error)) from error
            else:
                if len(self._text) - end < NEAR and self._more():
                    continue  # a number may go on
                self._pass(end)
                return row

    def wrong(self, what: str, at: int | None = None) -> DataError:
        """The error that names the line of `at`, or else of what comes next."""
        line = self.line + self._text.count("\n", self._at, self._at if at is None else at)
        return DataError(Problem("data.path", f"{self._file}:{line}", f"is not valid JSON: {what}"))

    def _cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the error may be only that the text ends here."""
        return error.msg.startswith("Unterminated string") or len(self._text[error.pos :].strip()) <= NEAR

    def _pass(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on; False at the end of the file, and where one row is longer than any may be."""
        rest = len(self._text) - self._at
        chunk = self._source.read(max(CHUNK, rest)) if rest < LONGEST else ""
        if chunk:
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


@contextmanager
def _text(opened: BinaryIO) -> Iterator[IO[str]]:
    """The file as text; it stays open, for its position is asked for afterwards."""
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    try:
        yield text
    finally:
        with suppress(ValueError):  # closed already, where rows were read in part only
            text.detach()


def _arrays(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """The items of an array, or of several one behind the other (`cat a.json b.json`), decoded as the file is read."""
    with _text(opened) as source:
        found = _Json(source, file)
        while sign := found.sign():
            if sign != "[":
                raise found.wrong("something other than an array stands behind the array's end")
            found.step()
            yield from _items(found)


def _items(found: _Json) -> Iterator[tuple[int, Any]]:
    """The items up to the array's end, and over it."""
    first = True
    while (sign := found.sign()) != "]":
        if sign and not first:
            if sign != ",":
                raise found.wrong("a comma is missing between two rows")
            found.step()
            sign = found.sign()
        if not sign:
            raise found.wrong("the array does not end")
        line, first = found.line, False
        yield line, found.item()
    found.step()


def _csv(opened: BinaryIO, file: Path, dialect: str) -> Iterator[tuple[int, Any]]:
    """Rows of a file with a heading."""
    csv.field_size_limit(LONGEST)
    with _text(opened) as lines:
        records = _records(csv.reader(lines, dialect, strict=True), file)
        _, heading = next(records, (1, []))
        for line, record in records:
            if len(record) == len(heading):
                yield line, dict(zip(heading, record, strict=True))
            else:
                yield line, Unreadable("has another number of columns than its heading")


def _records(reader: Any, file: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line where it begins, record) of each that is not blank."""
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

    def batches() -> Any:  # read piece by piece: otherwise memory grows with the row group, which may be the whole file
        return parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20).iter_batches(batch_size=ROWS)

    yield from _batches(file, batches)


def _arrow(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """An Arrow file, or the stream format that `datasets` writes."""
    import pyarrow as arrow

    def batches() -> Any:
        try:
            found = arrow.ipc.open_file(opened)
            return (found.get_batch(number) for number in range(found.num_record_batches))
        except arrow.ArrowInvalid:
            opened.seek(0)
            return arrow.ipc.open_stream(opened)

    yield from _batches(file, batches)


def _batches(file: Path, opened: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    import pyarrow as arrow

    try:
        yield from enumerate((row for batch in opened() for row in batch.to_pylist()), 1)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(Problem("data.path", file, f"is damaged, or not of its kind: {error}")) from error


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[tuple[int, Any]]]] = {
    ".json": _arrays,
    ".csv": partial(_csv, dialect="excel"),
    ".tsv": partial(_csv, dialect="excel-tab"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""(number, row or what is wrong with it) of an opened file, by its ending."""
