"""Checks and converts single values of a row: nulls, texts, numbers, JSON text."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

Row = Mapping[str, Any]
Names = Mapping[str, str]
"""A renaming of columns or of roles."""


def is_null(value: object) -> bool:
    """None, or NaN, which pandas writes where a table has no value."""
    return value is None or (isinstance(value, float) and value != value)


def is_filled(value: object) -> bool:
    """Whether a value is there: not null, and no empty text, list or object (also as JSON text). False and 0 are values."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}")
    return not is_null(value) and not (isinstance(value, list | tuple | Mapping) and not value)


def first_filled(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of these columns that is not null: Arrow files store null in a row that lacks the column."""
    for name in names:  # a loop, not a generator: this runs for many columns of every row
        if row.get(name) is not None:
            return name
    return None


def kind_of(value: object) -> str:
    """The kind of a value in words, for messages."""
    kinds = {list: "a list", tuple: "a list", dict: "an object", bool: "true or false", str: "a text"}
    return "null" if is_null(value) else kinds.get(type(value), type(value).__name__)


def short(value: object) -> str:
    return "null" if is_null(value) else repr(value)[:60]


def number_text(value: object) -> str | None:
    """A finite number as text; None for any other value. True and false are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value in (float("inf"), float("-inf")):
        return None
    return json.dumps(value)


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def parse_json(text: str, where: str) -> Any:
    """The value that a JSON text stands for. Raises ValueError; its message names `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:2] in ("[{", "{'", "['") and "'" in text[:20]:
            raise ValueError(
                f"{where} is a list or an object as Python prints it, not JSON: write it with json.dumps(...), "
                f"not with str(...): {text[:60]!r}"
            ) from error
        raise ValueError(f"{where} is not valid JSON ({error.msg} at column {error.colno}): {text[:60]!r}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not valid JSON (nested too deeply): {text[:60]!r}") from error
    except ValueError as error:  # Python's limit on the number of digits of an integer
        raise ValueError(f"{where} is not valid JSON ({error}): {text[:60]!r}") from error


def parse_list(value: Any, where: str) -> Any:
    """The list in a JSON text; any other value as it is. Tables such as CSV hold lists as text."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        return parse_json(value, where)
    return value


def check_json(value: object, where: str) -> None:
    """Raise ValueError if the value cannot be written as JSON, which has no NaN and no Infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError) as error:
        reason = "NaN or Infinity" if isinstance(error, ValueError) else str(error)
        raise ValueError(
            f"{where} cannot be written as JSON ({reason}): give null or a number, or drop the row"
        ) from error


def check_json_object(text: str, where: str) -> None:
    """Raise ValueError if the text is not a JSON object."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{where} has {constant}, which JSON does not have: give null or a number, or drop the row")

    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {kind_of(value)}, not an object: give {{name: value}} for each argument")
    if "NaN" in text or "Infinity" in text:
        json.loads(text, parse_constant=refuse)
