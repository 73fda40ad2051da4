"""Reads the rows of a JSON file that is not one row per line: arrays, objects over many lines, or a list inside an object."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class Unreadable(ValueError):
    """A line or record that is not a row; the message says why."""


class RepeatedKey(ValueError):
    """A JSON object has a key twice, so one of its values would be lost."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"an object has the key {repeated!r} twice: remove one of them, or drop the row")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
"""Decodes JSON, and raises RepeatedKey where json.loads keeps only the last of several values."""


class _JsonReader:
    """Decodes a JSON file value by value. Keeps the text that is not decoded yet, and the line where it begins."""

    def __init__(self, source: IO[str], file: str) -> None:
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

    def consume(self, sign: str, reason: str) -> None:
        """Consume this character, which must come next."""
        if self.peek() != sign:
            raise self.error(reason)
        self.skip()

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
def as_text(opened: BinaryIO) -> Iterator[IO[str]]:
    """The file as UTF-8 text. The file itself stays open, because the caller asks for its position."""
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    try:
        yield text
    finally:
        with suppress(ValueError):  # the file is closed already if the caller read only some rows
            text.detach()


def json_arrays(opened: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    """The items of one array, or of several in sequence (`cat a.json b.json`), decoded while the file is read."""
    with as_text(opened) as source:
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


def json_objects(opened: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    """(line, object) of objects in sequence, each over any number of lines."""
    with as_text(opened) as source:
        reader = _JsonReader(source, file)
        while character := reader.peek():
            if character != "{":
                comma = "a comma follows an object: remove it, or write all objects as one list, [{...}, {...}]"
                raise reader.error(comma if character == "," else "text that is no object follows an object: remove it")
            line = reader.line
            yield line, reader.value()


def wrapped_rows(opened: BinaryIO, file: str, key: str) -> Iterator[tuple[int, Any]]:
    """(line, item) of the list under `key` in the file's only object. Raises DataError if another key holds rows too."""
    with as_text(opened) as source:
        reader = _JsonReader(source, file)
        reader.consume("{", "an object must begin here")
        while reader.peek() != "}":
            if reader.peek() != '"':
                raise reader.error("a key must follow")
            name = reader.value()
            reader.consume(":", "a colon is missing behind a key")
            if reader.peek() == "[" and name == key:
                reader.skip()
                yield from _array_items(reader)
            else:
                line, value = reader.line, reader.value()
                if holds_rows(value):
                    message = (
                        f"{key} and {name} both hold lists of objects: write the rows of each to a file of its own"
                    )
                    raise DataError(Problem("data.path", f"{file}:{line}", message))
            if reader.peek() != "}":
                reader.consume(",", "a comma is missing, or the object does not end")
        reader.skip()
        if reader.peek():
            raise reader.error("nothing may follow the object that holds the rows")


def holds_rows(value: object) -> bool:
    """Whether a value is a list of objects."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
