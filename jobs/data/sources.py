"""Reads raw rows from files or a Hub data set, block by block, so that memory does not grow with the size of the input.

Every row keeps its location (file and line), so that messages can name it.
"""

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
from conf.errors import DataError, Problem, first_line
from jobs.data.file_readers import BLOCK_ROWS, CHUNK, MAX_ROW_LENGTH, READERS, Unreadable

Row = dict[str, Any]
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BOM = b"\xef\xbb\xbf"
LINES = (".jsonl", ".json", ".txt")
"""Endings of files that are read line by line; .json and .jsonl files that hold an array are not."""
ENDINGS = tuple(dict.fromkeys((*LINES, *READERS)))
METADATA = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `save_to_disk` and LLaMA-Factory write beside the rows; they hold no rows."""


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


def read_blocks(path: str, split: str | None = None, limit: int | None = None) -> Iterator[Block]:
    """All rows of a file, a folder, a glob, or else a Hub data set (`owner/name` or `owner/name:split`), as blocks.

    `split` selects a part, for example [10%:]; `limit` is the most rows to take from that part.
    Raises DataError for a source that cannot be read or has no rows. Single broken rows do not raise: see `Block.parsed`.
    """
    blocks = _all_blocks(path)
    if split is not None or limit is not None:
        start, stop = _bounds(split, lambda: _count_rows(path))
        stop = min(stop, start + limit) if limit is not None else stop
        blocks = _slice_rows(blocks, start, stop)
    empty = True
    for block in blocks:
        empty = False
        yield block
    if empty:
        raise DataError(Problem("data.path", path, f"has no rows in {split}" if split else "has no rows"))


def total_bytes(path: str) -> int | None:
    """Bytes of all files of a source; None for a Hub set, because its rows are counted instead."""
    files = data_files(path)
    return None if files is None else sum(file.stat().st_size for file in files)


def data_files(path: str) -> list[Path] | None:
    """The files of a source in the order in which they are read; None if `path` can only be the name of a Hub set.

    Raises DataError if the path looks like a file, a folder or a glob, but has no data file.
    """
    named = Path(path).expanduser()
    if named.exists() and not named.is_dir():
        return [named]
    matched = (
        sorted(named.rglob("*")) if named.is_dir() else [*map(Path, sorted(glob.glob(str(named), recursive=True)))]
    )
    files = [item for item in matched if item.is_file() and file_format(item) in ENDINGS and item.name not in METADATA]
    if files:
        return files
    if matched or named.is_dir():
        raise DataError(Problem("data.path", path, f"has no file ending in {', '.join(ENDINGS)}"))
    if path.startswith(("/", ".", "~")) or any(sign in path for sign in "*?["):
        raise DataError(Problem("data.path", path, "no such file"))
    return None


def _all_blocks(path: str) -> Iterator[Block]:
    files = data_files(path)
    return _hub_blocks(path) if files is None else _blocks_of_files(files)


def _count_rows(path: str) -> int:
    """The number of all rows; unreadable ones count too."""
    if data_files(path) is None:
        return len(load_hub_dataset(path))
    return sum(1 for block in _all_blocks(path) for _ in block.parsed())


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


def _blocks_of_files(files: list[Path]) -> Iterator[Block]:
    before = 0  # bytes of the files before this one
    for file in files:
        for block in _file_blocks(file):
            yield replace(block, read=before + block.read)
        before += file.stat().st_size


def _check_object(row: Any) -> Row | Unreadable:
    if isinstance(row, list):
        return Unreadable('is a list, not an object with named columns: write each row as {"messages": [...]}')
    return row if isinstance(row, dict | Unreadable) else Unreadable("is not an object with named columns")


def _parse_line(line: bytes, plain: bool) -> Row | Unreadable:
    try:
        text = line.decode("utf-8")
        return {"text": text.rstrip("\r\n")} if plain else _check_object(json.loads(text))
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 ({error.reason}): convert the file, e.g. with iconv")
    except json.JSONDecodeError as error:
        return Unreadable(f"is not valid JSON: {error.msg}")
    except RecursionError:
        return Unreadable("is not valid JSON: nested too deeply")
    except ValueError as error:  # Python limits the digits of a number
        return Unreadable(f"is not valid JSON: {error}")


def file_format(file: Path) -> str:
    """The ending that names the format of a file, in lower case and without that of the compression: .jsonl of A.JSONL.GZ."""
    return (file.with_suffix("") if file.suffix.lower() in OPENERS else file).suffix.lower()


def _file_blocks(file: Path) -> Iterator[Block]:
    """The blocks of one file; `read` counts the bytes of this file only."""
    ending = file_format(file)
    if ending not in ENDINGS:
        raise DataError(Problem("data.path", file, f"ends in none of {', '.join(ENDINGS)}"))
    try:
        with file.open("rb") as raw:
            decompress = OPENERS.get(file.suffix.lower())
            opened = decompress(raw, "rb") if decompress else raw
            for first, lines, rows in _read_parts(ending, opened, file):
                yield Block(f"{file}:", raw.tell(), first, lines, ending == ".txt", rows)
    except UnicodeDecodeError as error:
        raise DataError(
            Problem("data.path", file, f"is not UTF-8 ({error.reason}): convert it, e.g. with iconv")
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(Problem("data.path", file, f"cannot be read: {error}")) from error


def _read_parts(
    ending: str, opened: BinaryIO, file: Path
) -> Iterator[tuple[int, bytes | None, tuple[tuple[int, Any], ...]]]:
    """(number of the first line, whole lines, ()) for a file of lines; (0, None, rows) for any other file.

    The first bytes decide, not the ending alone: users have arrays in .jsonl files, and lines in .json files.
    """
    begin = _peek(opened)
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(
            Problem("data.path", file, "is UTF-16, not UTF-8: convert it, e.g. with iconv -f UTF-16 -t UTF-8")
        )
    array = ending in (".json", ".jsonl") and begin.removeprefix(BOM).lstrip().startswith(b"[")
    array = array and not (ending == ".jsonl" and _is_lines_of_lists(begin))
    if ending in LINES and not array:
        yield from ((first, lines, ()) for first, lines in _read_lines(opened, file))
        return
    rows = iter(READERS[".json" if array else ending](opened, file))
    while part := tuple(islice(rows, BLOCK_ROWS)):
        yield 0, None, part


def _is_lines_of_lists(begin: bytes) -> bool:
    """Whether each line is a list of its own, judged by the first two lines."""
    first, _, rest = begin.removeprefix(BOM).lstrip().partition(b"\n")
    return first.rstrip().endswith(b"]") and rest.lstrip().startswith(b"[")


def _peek(opened: Any) -> bytes:
    """The first 64 KiB; the position goes back to the start."""
    begin: bytes = opened.read(64 * 2**10)
    opened.seek(0)
    return begin


def _read_lines(opened: BinaryIO, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines), about CHUNK bytes each time."""
    first, rest = 1, io.BytesIO()
    if _peek(opened).startswith(BOM):
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


def _hub_blocks(path: str) -> Iterator[Block]:
    rows, last = enumerate(load_hub_dataset(path), 1), 0
    try:
        while part := tuple((number, dict(row)) for number, row in islice(rows, BLOCK_ROWS)):
            last = part[-1][0]
            yield Block(f"{path} row ", last, rows=part)
    except Exception as error:  # anything that `datasets` raises: a damaged or missing cache file, a full disk
        raise DataError(Problem("data.path", path, f"cannot be read after row {last}: {first_line(error)}")) from error


def load_hub_dataset(path: str) -> Any:
    """A `datasets.Dataset` from the Hub; `owner/name:train[:100]` names a split or a part of it.

    Raises DataError with the Hub's reason.
    """
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, split = path.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:  # anything that the Hub's client raises: no network, no such set, a gated set
        offline = " (HF_HUB_OFFLINE is set: fill HF_HOME on a machine with network)" if HF_HUB_OFFLINE else ""
        message = f"no such file, and the Hub answers: {first_line(error)}{offline}"
        raise DataError(Problem("data.path", path, message)) from error
