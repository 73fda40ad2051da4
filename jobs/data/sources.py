"""Reads raw rows from files or a Hub data set, block by block, so that memory does not grow with the size of the input.

Every row keeps its location (file and line), so that messages can name it.
"""

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, cast

from conf.columns import SPLIT
from conf.data_endings import ENDINGS
from conf.errors import DataError, Problem, UserError, first_line
from conf.schema_model import DataSet
from jobs.data import hub
from jobs.data.arrow_rows import arrow_rows, parquet_rows
from jobs.data.csv_rows import csv_rows
from jobs.data.data_files import find_files
from jobs.data.file_readers import (
    BLOCK_ROWS,
    CHUNK,
    DECODER,
    MAX_ROW_LENGTH,
    RepeatedKey,
    Unreadable,
    json_arrays,
    json_objects,
    wrapped_rows,
)
from jobs.data.file_trees import DataFile
from jobs.data.json_layout import BOM, Kind, find_layout

Row = dict[str, Any]
Reader = Callable[[BinaryIO, str], Iterator[tuple[int, Any]]]
JSON = (".jsonl", ".json", ".ndjson")
"""Endings of files whose first bytes say whether their rows are lines."""
BEGIN = 64 * 2**10
"""Bytes that say how a file holds its rows."""
LONG_LINE = 2**24
"""How far to look for the end of the first line, in bytes, if it is longer than BEGIN."""
READERS: dict[str, Reader] = {
    ".csv": partial(csv_rows, separator=","),
    ".tsv": partial(csv_rows, separator="\t"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
"""By file ending, a function that reads an opened file and yields (number, row), or (number, Unreadable) for a broken row.

The number is the line where the row begins, or for Parquet and Arrow the row number from 1."""


@dataclass(frozen=True)
class Block:
    """Some consecutive rows of one file or Hub set: either unparsed lines, to be parsed by a worker process, or parsed rows."""

    location: str
    """What precedes a row's number in a message: `file:` or `owner/name row `."""
    read: int
    """How much of the whole source had been read at the end of this block: bytes of its files, or rows of a Hub set."""
    first: int = 1
    """Number of the first line."""
    lines: bytes | None = None
    """Whole lines; None if `rows` holds parsed rows."""
    plain: bool = False
    """Whether a line is plain text instead of JSON."""
    rows: tuple[tuple[int, Any], ...] = ()

    def parsed(self) -> Iterator[tuple[int, Row | Unreadable]]:
        """(number, row) of each row; (number, Unreadable) for a line that is no row."""
        if self.lines is None:
            yield from ((number, _check_object(row)) for number, row in self.rows)
            return
        for number, line in enumerate(self.lines.split(b"\n"), self.first):
            if line.strip():
                yield number, _parse_line(line, self.plain)


def read_blocks(source: DataSet, limit: int | None = None) -> Iterator[Block]:
    """All rows of a source (`conf.schema.Data.path` says what it may be), as blocks.

    `source.split` selects a part, for example [10%:]; `limit` is the most rows to take from that part.
    Raises DataError for a source that cannot be read or has no rows. Single broken rows do not raise: see `Block.parsed`.
    """
    blocks, split = _all_blocks(source), source.split
    if split is not None or limit is not None:
        start, stop = _bounds(split, lambda: _count_rows(source))
        stop = min(stop, start + limit) if limit is not None else stop
        blocks = _slice_rows(blocks, start, stop)
    empty = True
    for block in blocks:
        empty = False
        yield block
    if empty:
        raise DataError(Problem("data.path", source.path, f"has no rows in {split}" if split else "has no rows"))


def total_size(source: DataSet) -> tuple[int, str]:
    """`Block.read` of the last block, and its unit: bytes of all files, or rows of a Hub set."""
    files = find_files(source)
    return (len(hub.load(source)), " rows") if files is None else (sum(file.size() for file in files), "B")


def _all_blocks(source: DataSet) -> Iterator[Block]:
    files = find_files(source)
    return _hub_blocks(source) if files is None else _blocks_of_files(files)


def _count_rows(source: DataSet) -> int:
    """The number of all rows; unreadable ones count too."""
    if find_files(source) is None:
        return len(hub.load(source))
    return sum(1 for block in _all_blocks(source) for _ in block.parsed())


def _bounds(split: str | None, count: Callable[[], int]) -> tuple[int, int]:
    """(first row, row after the last) of a part, with the rules of Python slices.

    Calls `count`, which reads the whole source, only for a percentage or a number from the end.
    """
    match = SPLIT.fullmatch(split or "[:]")
    if match is None:
        raise DataError(Problem("data.split", split, "is not a part of rows: write [:1000], [10%:] or [-100:]"))
    ends = match.groups()
    total = count() if any(end and ("%" in end or "-" in end) for end in ends) else sys.maxsize
    numbers = [int(end[:-1]) * total // 100 if end and end.endswith("%") else int(end) if end else None for end in ends]
    start, stop, _ = slice(*numbers).indices(total)
    return start, stop


def _slice_rows(blocks: Iterator[Block], start: int, stop: int) -> Iterator[Block]:
    """Rows [start, stop), in blocks of parsed rows: how many rows a block of lines has is only known once it is parsed."""
    numbered = ((block, item) for block in blocks for item in block.parsed())
    kept = islice(numbered, start, stop)
    while part := list(islice(kept, BLOCK_ROWS)):
        for location in dict.fromkeys(block.location for block, _ in part):
            rows = tuple(item for block, item in part if block.location == location)
            yield Block(location, part[-1][0].read, rows=rows)


def _blocks_of_files(files: list[DataFile]) -> Iterator[Block]:
    before = 0  # bytes of the files before this one
    for file in files:
        for block in _file_blocks(file):
            yield replace(block, read=before + block.read)
        before += file.size()


def _check_object(row: Any) -> Row | Unreadable:
    if isinstance(row, list):
        return Unreadable('is a list, not an object with named columns: write each row as {"messages": [...]}')
    return row if isinstance(row, dict | Unreadable) else Unreadable("is not an object with named columns")


def _parse_line(line: bytes, plain: bool) -> Row | Unreadable:
    try:
        text = line.decode("utf-8")
        return {"text": text.rstrip("\r\n")} if plain else _check_object(DECODER.decode(text))
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 ({error.reason}): convert the file, e.g. with iconv")
    except json.JSONDecodeError as error:
        return Unreadable(f"is not valid JSON: {error.msg}")
    except RepeatedKey as error:
        return Unreadable(f"is not clear: {error}")
    except RecursionError:
        return Unreadable("is not valid JSON: nested too deeply")
    except ValueError as error:  # Python limits the digits of a number
        return Unreadable(f"is not valid JSON: {error}")


def _file_blocks(file: DataFile) -> Iterator[Block]:
    """The blocks of one file; `read` counts the bytes of this file only."""
    if file.format not in ENDINGS:
        raise DataError(Problem("data.path", file.location, f"ends in none of {', '.join(ENDINGS)}"))
    try:
        begin, more_lines = _begin(file)
        with file.open() as raw:
            opened = _decompressed(raw, file.compression)
            for first, lines, rows in _read_parts(file, opened, begin, more_lines):
                yield Block(f"{file.location}:", raw.tell(), first, lines, file.format == ".txt", rows)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 ({error.reason}): convert it, e.g. with iconv"
        raise DataError(Problem("data.path", file.location, message)) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(Problem("data.path", file.location, f"cannot be read: {first_line(error)}")) from error
    except Exception as error:  # anything that the client of a remote file system raises
        if file.filesystem is None or isinstance(error, UserError):
            raise
        raise DataError(Problem("data.path", file.location, f"cannot be read: {first_line(error)}")) from error


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".zst":
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers[compression](raw, "rb")) if compression else raw


def _begin(file: DataFile) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether text follows its first line, as far as LONG_LINE."""
    with file.open() as raw:
        opened = _decompressed(raw, file.compression)
        begin = opened.read(BEGIN)
        text = begin.removeprefix(BOM).lstrip()
        if file.format not in JSON or not text.startswith(b"{"):
            return begin, False
        first_line_ends, behind = b"\n" in text, text.partition(b"\n")[2]
        read = len(begin)
        while not behind.strip() and read < LONG_LINE and (chunk := opened.read(2**20)):
            behind += chunk if first_line_ends else chunk.partition(b"\n")[2]
            first_line_ends = first_line_ends or b"\n" in chunk
            read += len(chunk)
        return begin, bool(behind.strip())


def _read_parts(
    file: DataFile, opened: BinaryIO, begin: bytes, more_lines: bool
) -> Iterator[tuple[int, bytes | None, tuple[tuple[int, Any], ...]]]:
    """(number of the first line, whole lines, ()) for a file of lines; (0, None, rows) for any other file."""
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        message = "is UTF-16, not UTF-8: convert it, e.g. with iconv -f UTF-16 -t UTF-8"
        raise DataError(Problem("data.path", file.location, message))
    reader = READERS.get(file.format)
    if file.format in JSON:
        layout = find_layout(begin, file.format, more_lines)
        by_kind: dict[Kind, Reader] = {
            Kind.array: json_arrays,
            Kind.objects: json_objects,
            Kind.wrapped: partial(wrapped_rows, key=layout.key),
        }
        reader = by_kind.get(layout.kind)
    if reader is None:
        yield from ((first, lines, ()) for first, lines in _read_lines(opened, file.location, begin.startswith(BOM)))
        return
    rows = iter(reader(opened, file.location))
    while part := tuple(islice(rows, BLOCK_ROWS)):
        yield 0, None, part


def _read_lines(opened: BinaryIO, file: str, has_bom: bool) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines), about CHUNK bytes each time."""
    first, rest = 1, io.BytesIO()
    if has_bom:
        opened.read(len(BOM))
    while chunk := opened.read(CHUNK):
        lines, newline, after = chunk.rpartition(b"\n")
        if newline:
            rest.write(lines)
            yield first, rest.getvalue()
            first += rest.getvalue().count(b"\n") + 1
            rest = io.BytesIO()
        rest.write(after)
        if rest.tell() > MAX_ROW_LENGTH:
            raise DataError(
                Problem("data.path", f"{file}:{first}", f"has no end of line within {MAX_ROW_LENGTH >> 20} MiB")
            )
    if rest.getvalue().strip():
        yield first, rest.getvalue()


def _hub_blocks(source: DataSet) -> Iterator[Block]:
    dataset, last = hub.load(source), 0
    try:
        for rows in hub.batches(dataset, source.path):
            first, last = last + 1, last + len(rows)
            yield Block(f"{source.path} row ", last, rows=tuple(enumerate(rows, first)))
    except DataError:
        raise
    except Exception as error:  # anything that `datasets` raises: a damaged or missing cache file, a full disk
        message = f"cannot be read after row {last}: {first_line(error)}"
        raise DataError(Problem("data.path", source.path, message)) from error
