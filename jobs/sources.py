"""Reads raw rows from files and the Hub, block by block, each with the place it came from: memory does not grow with the input."""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from conf.columns import SPLIT
from conf.errors import DataError, Problem

Row = dict[str, Any]
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOM = b"\xef\xbb\xbf"
CHUNK = 2**20
"""Characters of a JSON array, or bytes of whole lines, that are read at a time."""
LONGEST = 2**28
"""Characters or bytes of one row: a file without ends must not fill the memory."""
ROWS = 256
"""Rows of a block, where a file has no lines to cut it at."""


class Unreadable(ValueError):
    """A line that holds no row."""


@dataclass(frozen=True)
class Block:
    """Some rows of one file: whole lines as they stand in it, to be parsed by another process, or rows that are parsed already."""

    place: str
    """What comes before a row's number to say where it is: `file:` or `owner/name row `."""
    read: int
    """How far the whole source had been read when the block was: bytes of its files, or rows of a Hub set."""
    first: int = 1
    """Number of the first line."""
    lines: bytes | None = None
    plain: bool = False
    """Whether a line is a text, and not JSON."""
    rows: tuple[tuple[int, Any], ...] = ()

    def parsed(self) -> Iterator[tuple[int, Row | Unreadable]]:
        """(number, row) of each row; what is wrong with a line comes in place of its row."""
        if self.lines is None:
            yield from ((number, _object(row)) for number, row in self.rows)
            return
        for number, line in enumerate(self.lines.split(b"\n"), self.first):
            if line.strip():
                yield number, _line(line, self.plain)


def rows(path: str, split: str | None = None, limit: int | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row of a file, a folder, a glob, or else a Hub data set (`owner/name` or `owner/name:split`).

    Raises DataError naming file and line for what cannot be read, and for what has no rows at all.
    """
    for block in blocks(path, split, limit):
        for number, row in block.parsed():
            if isinstance(row, Unreadable):
                raise DataError(Problem("data.path", f"{block.place}{number}", str(row)))
            yield f"{block.place}{number}", row


def blocks(path: str, split: str | None = None, limit: int | None = None) -> Iterator[Block]:
    """The same rows as blocks, in the same order. `split` is a part such as [10%:], `limit` the most rows of that."""
    files = _files(path)
    found = _hub(path) if files is None else _of_files(files)
    if split is not None or limit is not None:
        start, stop = _bounds(split, lambda: sum(1 for _ in rows(path)))
        stop = min(stop, start + limit) if limit is not None else stop
        found = _cut(found, start, stop)
    empty = True
    for block in found:
        empty = False
        yield block
    if empty:
        what = f"has no rows in {split}" if split else "has no rows"
        raise DataError(Problem("data.path", path, what))


def size(path: str) -> int | None:
    """Bytes of all files of a source; None for the Hub's, whose rows are counted instead."""
    files = _files(path)
    return None if files is None else sum(file.stat().st_size for file in files)


def files(path: str) -> list[Path] | None:
    """The files of a source, in the order in which they are read; None for the Hub's."""
    return _files(path)


def _bounds(split: str | None, count: Callable[[], int]) -> tuple[int, int]:
    """First row and the one after the last, as Python's slices count; rows are counted only where a percentage or a
    number from the end needs it."""
    found = SPLIT.fullmatch(split or "[:]")
    if found is None:
        raise DataError(Problem("data.split", split, "is not a part of rows: write [:1000], [10%:] or [-100:]"))
    ends = found.groups()
    total = count() if any(end and ("%" in end or "-" in end) for end in ends) else sys.maxsize
    places = [int(end[:-1]) * total // 100 if end and end.endswith("%") else int(end) if end else None for end in ends]
    start, stop, _ = slice(*places).indices(total)
    return start, stop


def _cut(found: Iterator[Block], start: int, stop: int) -> Iterator[Block]:
    """Rows [start, stop) of all, in blocks of parsed rows: how many there are in lines is not known before."""
    numbered = ((block, item) for block in found for item in block.parsed())
    kept = islice(numbered, start, stop)
    while part := list(islice(kept, ROWS)):
        for place in dict.fromkeys(block.place for block, _ in part):
            mine = tuple(item for block, item in part if block.place == place)
            yield Block(place, part[-1][0].read, rows=mine)


def _of_files(found: list[Path]) -> Iterator[Block]:
    behind = 0
    for file in found:
        for block in _file(file):
            yield replace(block, read=behind + block.read)
        behind += file.stat().st_size


def _object(row: Any) -> Row | Unreadable:
    return row if isinstance(row, dict | Unreadable) else Unreadable("is not an object with named columns")


def _line(line: bytes, plain: bool) -> Row | Unreadable:
    try:
        text = line.decode("utf-8")
        return {"text": text.rstrip("\r\n")} if plain else _object(json.loads(text))
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 ({error.reason}): convert the file, e.g. with iconv")
    except json.JSONDecodeError as error:
        return Unreadable(f"is not valid JSON: {error.msg}")
    except RecursionError:
        return Unreadable("is not valid JSON: nested too deeply")


def _files(path: str) -> list[Path] | None:
    """The files that a path names, sorted; None where it names none and can only mean the Hub."""
    if Path(path).is_dir():
        found = sorted(item for item in Path(path).rglob("*") if item.is_file() and kind(item) in READERS)
        if not found:
            raise DataError(Problem("data.path", path, f"has no file ending in {', '.join(READERS)}"))
        return found
    if Path(path).exists():
        return [Path(path)]
    if found := sorted(glob.glob(str(Path(path).expanduser()), recursive=True)):
        return [Path(item) for item in found]
    if path.startswith(("/", ".", "~")) or any(sign in path for sign in "*?["):
        raise DataError(Problem("data.path", path, "no such file"))
    return None


def kind(file: Path) -> str:
    """The ending that says how rows stand in a file, under any compression."""
    return (file.with_suffix("") if file.suffix in OPENERS else file).suffix.lower()


def _file(file: Path) -> Iterator[Block]:
    """One file's blocks; `read` counts its own bytes."""
    ending = kind(file)
    if ending not in READERS:
        raise DataError(Problem("data.path", file, f"ends in none of {', '.join(READERS)}"))
    try:
        with file.open("rb") as raw:
            opened = OPENERS[file.suffix](raw, "rb") if file.suffix in OPENERS else raw
            for first, lines, found in _parts(ending, opened, file):
                yield Block(f"{file}:", raw.tell(), first, lines, ending == ".txt", found)
    except UnicodeDecodeError as error:
        raise DataError(
            Problem("data.path", file, f"is not UTF-8 ({error.reason}): convert it, e.g. with iconv")
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(Problem("data.path", file, f"cannot be read: {error}")) from error


def _parts(
    ending: str, opened: BinaryIO, file: Path
) -> Iterator[tuple[int, bytes | None, tuple[tuple[int, Any], ...]]]:
    """(first line, whole lines, none) of a file of lines, and (0, none, rows) of any other.

    What a file is, its beginning says: arrays are found under .jsonl, and lines under .json.
    """
    begin = _peek(opened)
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(
            Problem("data.path", file, "is UTF-16, not UTF-8: convert it, e.g. with iconv -f UTF-16 -t UTF-8")
        )
    array = ending in (".json", ".jsonl") and begin.removeprefix(BOM).lstrip().startswith(b"[")
    if ending in (".txt", ".json", ".jsonl") and not array:
        yield from ((first, lines, ()) for first, lines in _lines(opened, file))
        return
    read = iter(READERS[".json" if array else ending](opened, file))
    while part := tuple(islice(read, ROWS)):
        yield 0, None, part


def _peek(opened: Any) -> bytes:
    """The first bytes, past blank lines, without moving on."""
    begin: bytes = opened.read(64 * 2**10)
    opened.seek(0)
    return begin


def _lines(opened: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the first, whole lines), each time about CHUNK bytes."""
    first, rest = 1, io.BytesIO()
    opened.read(len(BOM)) if _peek(opened).startswith(BOM) else None
    while chunk := opened.read(CHUNK):
        lines, end, after = chunk.rpartition(b"\n")
        if end:
            rest.write(lines)
            yield first, rest.getvalue()
            first += rest.getvalue().count(b"\n") + 1
            rest = io.BytesIO()
        rest.write(after)
        if rest.tell() > LONGEST:
            raise DataError(Problem("data.path", f"{file}:{first}", f"has no end of line within {LONGEST >> 20} MiB"))
    if rest.getvalue().strip():
        yield first, rest.getvalue()


@contextmanager
def _text(opened: BinaryIO) -> Iterator[IO[str]]:
    """The file as text; it stays open, for its position is asked for afterwards."""
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    try:
        yield text
    finally:
        with suppress(ValueError):  # closed already, where rows were read in part only
            text.detach()


def _json(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """The items of one array, decoded one by one as the file is read."""
    decoder = json.JSONDecoder()
    with _text(opened) as source:
        text = source.read(CHUNK)
        while "[" not in text:
            text += source.read(CHUNK)
        at = text.index("[") + 1
        line = 1 + text.count("\n", 0, at)
        while True:
            at, line = _skip(text, at, line)
            if at < len(text) and text[at] == "]":
                return
            problem = json.JSONDecodeError("the array does not end", text, len(text))
            try:
                row, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                row, end, problem = None, len(text), error
            if end == len(text):  # the row may go on in the next chunk
                more = source.read(max(CHUNK, len(text) - at)) if len(text) - at < LONGEST else ""
                if not more:
                    raise _not_json(file, line + text.count("\n", at, problem.pos), problem)
                text, at = text[at:] + more, 0
                continue
            yield line, row
            line, at = line + text.count("\n", at, end), end


def _skip(text: str, at: int, line: int) -> tuple[int, int]:
    """Over white space and commas."""
    while at < len(text) and text[at] in " \t\r\n,":
        line += text[at] == "\n"
        at += 1
    return at, line


def _csv(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV (or TSV) file with a heading."""
    with _text(opened) as lines:
        reader = csv.DictReader(lines, dialect="excel-tab" if kind(file) == ".tsv" else "excel", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    yield reader.line_num, Unreadable("has another number of columns than its heading")
                else:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(Problem("data.path", f"{file}:{reader.line_num}", f"is not valid CSV: {error}")) from error


def _parquet(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as parquet

    yield from _batches(file, lambda: parquet.ParquetFile(opened).iter_batches(batch_size=ROWS))


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


def _hub(path: str) -> Iterator[Block]:
    found = enumerate(hub(path), 1)
    while part := tuple((number, dict(row)) for number, row in islice(found, ROWS)):
        yield Block(f"{path} row ", part[-1][0], rows=part)


def hub(path: str) -> Any:
    """A Hub data set; `owner/name:train[:100]` names a split or a part of one. Raises DataError with the Hub's reason."""
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, split = path.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the Hub's client raises: offline, no such set, a gated one
        offline = " (HF_HUB_OFFLINE is set: fill HF_HOME where there is a network)" if HF_HUB_OFFLINE else ""
        raise DataError(
            Problem("data.path", path, f"is no file, and the Hub says: {str(error).splitlines()[0]}{offline}")
        ) from error


def _not_json(file: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(Problem("data.path", f"{file}:{line}", f"is not valid JSON: {error.msg}"))


READERS: dict[str, Callable[[BinaryIO, Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
