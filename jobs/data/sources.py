"""Reads raw rows from files and the Hub, block by block, each with the place it came from: memory does not grow with the input."""

import bz2
import glob
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from conf.columns import SPLIT
from conf.errors import DataError, Problem
from jobs.data.file_readers import CHUNK, LONGEST, READERS, ROWS, Unreadable

Row = dict[str, Any]
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOM = b"\xef\xbb\xbf"
LINES = (".jsonl", ".json", ".txt")
"""Endings of files that are read line by line."""
ENDINGS = tuple(dict.fromkeys((*LINES, *READERS)))
ABOUT = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `save_to_disk` and LLaMA-Factory keep beside the rows."""


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
    found = _all(path)
    if split is not None or limit is not None:
        start, stop = _bounds(split, lambda: _count(path))
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
    found = files(path)
    return None if found is None else sum(file.stat().st_size for file in found)


def files(path: str) -> list[Path] | None:
    """The files of a source, in the order in which they are read; None where it names none and can only mean the Hub."""
    named = Path(path).expanduser()
    if named.exists() and not named.is_dir():
        return [named]
    matched = (
        sorted(named.rglob("*")) if named.is_dir() else [*map(Path, sorted(glob.glob(str(named), recursive=True)))]
    )
    found = [item for item in matched if item.is_file() and kind(item) in ENDINGS and item.name not in ABOUT]
    if found:
        return found
    if matched or named.is_dir():
        raise DataError(Problem("data.path", path, f"has no file ending in {', '.join(ENDINGS)}"))
    if path.startswith(("/", ".", "~")) or any(sign in path for sign in "*?["):
        raise DataError(Problem("data.path", path, "no such file"))
    return None


def _all(path: str) -> Iterator[Block]:
    found = files(path)
    return _hub(path) if found is None else _of_files(found)


def _count(path: str) -> int:
    """Rows, those that cannot be read too."""
    return len(hub(path)) if files(path) is None else sum(1 for block in _all(path) for _ in block.parsed())


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
    if isinstance(row, list):
        return Unreadable('is a list, not an object with named columns: write each row as {"messages": [...]}')
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
    except ValueError as error:  # Python's limit on the digits of a number
        return Unreadable(f"is not valid JSON: {error}")


def kind(file: Path) -> str:
    """The ending that says how rows stand in a file, under any compression."""
    return (file.with_suffix("") if file.suffix.lower() in OPENERS else file).suffix.lower()


def _file(file: Path) -> Iterator[Block]:
    """One file's blocks; `read` counts its own bytes."""
    ending = kind(file)
    if ending not in ENDINGS:
        raise DataError(Problem("data.path", file, f"ends in none of {', '.join(ENDINGS)}"))
    try:
        with file.open("rb") as raw:
            compressed = OPENERS.get(file.suffix.lower())
            opened = compressed(raw, "rb") if compressed else raw
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
    array = array and not (ending == ".jsonl" and _lists(begin))
    if ending in LINES and not array:
        yield from ((first, lines, ()) for first, lines in _lines(opened, file))
        return
    read = iter(READERS[".json" if array else ending](opened, file))
    while part := tuple(islice(read, ROWS)):
        yield 0, None, part


def _lists(begin: bytes) -> bool:
    """Whether each line is a list, as far as the first two show."""
    first, _, after = begin.removeprefix(BOM).lstrip().partition(b"\n")
    return first.rstrip().endswith(b"]") and after.lstrip().startswith(b"[")


def _peek(opened: Any) -> bytes:
    """The first bytes, without moving on."""
    begin: bytes = opened.read(64 * 2**10)
    opened.seek(0)
    return begin


def _lines(opened: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the first, whole lines), each time about CHUNK bytes."""
    first, rest = 1, io.BytesIO()
    if _peek(opened).startswith(BOM):
        opened.read(len(BOM))
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


def _hub(path: str) -> Iterator[Block]:
    found, behind = enumerate(hub(path), 1), 0
    try:
        while part := tuple((number, dict(row)) for number, row in islice(found, ROWS)):
            behind = part[-1][0]
            yield Block(f"{path} row ", behind, rows=part)
    except Exception as error:  # whatever `datasets` raises: a damaged or missing file of its cache, a full disk
        raise DataError(Problem("data.path", path, f"cannot be read after row {behind}: {_said(error)}")) from error


def hub(path: str) -> Any:
    """A Hub data set; `owner/name:train[:100]` names a split or a part of one. Raises DataError with the Hub's reason."""
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, split = path.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the Hub's client raises: offline, no such set, a gated one
        offline = " (HF_HUB_OFFLINE is set: fill HF_HOME where there is a network)" if HF_HUB_OFFLINE else ""
        raise DataError(Problem("data.path", path, f"is no file, and the Hub says: {_said(error)}{offline}")) from error


def _said(error: Exception) -> str:
    """The first line of what it says; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
