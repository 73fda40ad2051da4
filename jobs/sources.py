"""Reads raw rows from files and the Hub, one at a time, each with the place it came from: memory does not grow with the input."""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from conf.errors import DataError, Problem

Row = dict[str, Any]
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CHUNK = 2**20
"""Characters of a JSON array that are read at a time."""


def rows(path: str) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row of a file, a folder, a glob, or else a Hub data set (`owner/name` or `owner/name:split`).

    Raises DataError naming file and line for what cannot be read, and for what has no rows at all.
    """
    files = _files(path)
    empty = True
    for where, row in (item for file in files for item in _file(file)) if files is not None else _hub(path):
        empty = False
        yield where, row
    if empty:
        raise DataError(Problem("data.path", path, "has no rows"))


def _files(path: str) -> list[Path] | None:
    """The files that a path names, sorted; None where it names none and can only mean the Hub."""
    if Path(path).is_dir():
        found = sorted(item for item in Path(path).rglob("*") if item.is_file() and _kind(item) in READERS)
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


def _kind(file: Path) -> str:
    """The ending that says how rows stand in a file, under any compression."""
    return (file.with_suffix("") if file.suffix in OPENERS else file).suffix.lower()


def _file(file: Path) -> Iterator[tuple[str, Row]]:
    reader = READERS.get(_kind(file))
    if reader is None:
        raise DataError(Problem("data.path", file, f"ends in none of {', '.join(READERS)}"))
    try:
        for number, row in reader(file):
            if not isinstance(row, dict):
                raise DataError(Problem("data.path", f"{file}:{number}", "is not an object with named columns"))
            yield f"{file}:{number}", row
    except UnicodeDecodeError as error:
        raise DataError(
            Problem("data.path", file, f"is not UTF-8 ({error.reason}): convert it, e.g. with iconv")
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(Problem("data.path", file, f"cannot be read: {error}")) from error


def _text(file: Path) -> IO[str]:
    if file.suffix in OPENERS:
        return io.TextIOWrapper(OPENERS[file.suffix](file, "rb"), encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig", newline="")


def _jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """A row a line; a file that begins with a bracket is an array in spite of its name."""
    with _text(file) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.lstrip().startswith("["):
                yield from _json(file)
                return
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise _not_json(file, number, error) from error


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    """The items of one array, decoded one by one as the file is read; rows one a line are taken too."""
    decoder = json.JSONDecoder()
    with _text(file) as source:
        text, line = source.read(CHUNK), 1
        if not text.lstrip().startswith("["):
            yield from _jsonl(file)
            return
        at = text.index("[") + 1
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
                more = source.read(CHUNK)
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


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV (or TSV) file with a heading."""
    with _text(file) as lines:
        reader = csv.DictReader(lines, dialect="excel-tab" if _kind(file) == ".tsv" else "excel", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        Problem(
                            "data.path", f"{file}:{reader.line_num}", "has another number of columns than its heading"
                        )
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(Problem("data.path", f"{file}:{reader.line_num}", f"is not valid CSV: {error}")) from error


def _plain(file: Path) -> Iterator[tuple[int, Any]]:
    """Each line that is not empty is a text."""
    with _text(file) as lines:
        yield from ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1) if line.strip())


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as parquet

    yield from _batches(file, lambda: parquet.ParquetFile(file).iter_batches(batch_size=1024))


def _arrow(file: Path) -> Iterator[tuple[int, Any]]:
    """An Arrow file, or the stream format that `datasets` writes."""
    import pyarrow as arrow

    def batches() -> Any:
        try:
            opened = arrow.ipc.open_file(file)
            return (opened.get_batch(number) for number in range(opened.num_record_batches))
        except arrow.ArrowInvalid:
            return arrow.ipc.open_stream(file)

    yield from _batches(file, batches)


def _batches(file: Path, opened: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    import pyarrow as arrow

    try:
        yield from enumerate((row for batch in opened() for row in batch.to_pylist()), 1)
    except arrow.ArrowInvalid as error:
        raise DataError(Problem("data.path", file, f"is damaged, or not of its kind: {error}")) from error


def _hub(path: str) -> Iterator[tuple[str, Row]]:
    """Rows of a Hub data set; `owner/name:train[:100]` names a split or a part of one."""
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name, _, split = path.partition(":")
    try:
        found = load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the Hub's client raises: offline, no such set, a gated one
        offline = " (HF_HUB_OFFLINE is set: fill HF_HOME where there is a network)" if HF_HUB_OFFLINE else ""
        raise DataError(
            Problem("data.path", path, f"is no file, and the Hub says: {str(error).splitlines()[0]}{offline}")
        ) from error
    yield from ((f"{path} row {number}", dict(row)) for number, row in enumerate(found, 1))


def _not_json(file: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(Problem("data.path", f"{file}:{line}", f"is not valid JSON: {error.msg}"))


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _plain,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
