"""Decides from the first bytes how a JSON file holds its rows; pure. A .jsonl file may hold an array, and a .json file lines."""

import json
import re
from dataclasses import dataclass
from enum import Enum, auto

from conf.columns import INPUT, INSTRUCTION, MESSAGES, OUTPUT
from jobs.data.file_readers import DECODER, NEAR_END, holds_rows

BOM = b"\xef\xbb\xbf"
ROW_COLUMNS = {*MESSAGES, *INSTRUCTION, *INPUT, *OUTPUT}
ROW_COLUMNS |= {"completion", "text", "segments", "input_ids", "tools", "functions", "history", "system", "documents"}
"""Columns that show that an object is a row, not what is around the rows."""
KEY = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*', re.DOTALL)


class Kind(Enum):
    """How a file holds its rows."""

    lines = auto()
    array = auto()
    objects = auto()
    """Objects in sequence, each over several lines."""
    wrapped = auto()
    """A list inside one object, such as {"version": 1, "data": [...]}."""


@dataclass(frozen=True)
class Layout:
    kind: Kind
    key: str = ""
    """For `wrapped`: the key of the list."""


def find_layout(begin: bytes, ending: str, rest_has_lines: bool) -> Layout:
    """The layout of a file from its first bytes and its ending (.json, .jsonl, .ndjson).

    rest_has_lines: whether text follows the first line, as far as the caller has looked.
    """
    text = begin.removeprefix(BOM).decode("utf-8", errors="replace").lstrip()
    if text.startswith("["):
        return Layout(Kind.lines if ending != ".json" and _is_lines_of_lists(text) else Kind.array)
    if not text.startswith("{"):
        return Layout(Kind.lines)
    first, newline, _ = text.partition("\n")
    if newline and _is_complete(first):
        return _single_object(text) if not rest_has_lines else Layout(Kind.lines)
    if newline and (not _continues(text) or _is_complete_object(text.split("\n", 2)[1])):
        return Layout(Kind.lines)  # the first line is broken
    if not newline and rest_has_lines:
        return Layout(Kind.lines)  # a long first line
    found = _single_object(text)
    return Layout(Kind.objects) if newline and found.kind is Kind.lines else found


def _single_object(text: str) -> Layout:
    key = _rows_key(text)
    return Layout(Kind.lines) if key is None else Layout(Kind.wrapped, key)


def _is_lines_of_lists(text: str) -> bool:
    """Whether each line is a list of its own, judged by the first two lines."""
    first, _, rest = text.partition("\n")
    return first.rstrip().endswith("]") and rest.lstrip().startswith("[")


def _is_complete(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_complete_object(line: str) -> bool:
    return line.lstrip().startswith("{") and _is_complete(line)


def _continues(text: str) -> bool:
    """Whether one value extends over several lines: it ends within this text, or can only be cut off by its end."""
    try:
        DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or len(text[error.pos :].strip()) <= NEAR_END
    except RecursionError:
        return False
    except ValueError:
        return True  # well-formed, but refused later
    return True


def _rows_key(text: str) -> str | None:
    """The key whose value is a list of objects, if the keys before it show that the object is not itself a row."""
    position = 1
    while match := KEY.match(text, position):
        name, position = str(json.loads(match[1], strict=False)), match.end()
        if name in ROW_COLUMNS:
            return None
        if match := re.compile(r"\[\s*(?=\{)").match(text, position):
            is_row = _is_message(text, match.end()) or _has_row_column_behind(text, position)
            return None if is_row else name
        try:
            _, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None  # longer than the first bytes, as no value around the rows is
    return None


def _is_message(text: str, position: int) -> bool:
    """Whether the object at this position is a turn of a chat: a list of such objects is a column of a row."""
    try:
        item, _ = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return False
    return bool({"role", "from"} & set(item))


def _has_row_column_behind(text: str, position: int) -> bool:
    """Whether the list at this position ends within the text, and a column of a row follows it."""
    try:
        value, position = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return False
    while match := KEY.match(text, position):
        if json.loads(match[1], strict=False) in ROW_COLUMNS:
            return True
        try:
            _, position = DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return False
    return not holds_rows(value)
