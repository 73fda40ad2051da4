"""Renames the columns of a row to those that a format expects (`data.fields`), by name or by a Jinja template over the row."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

Row = Mapping[str, Any]
Names = Mapping[str, str]
"""A renaming of columns or of roles."""


def map_columns(row: Row, fields: Names | None) -> Row:
    """The row with the columns that `fields` names, under the format's names; the whole row if `fields` names none.

    Other columns are dropped, so that they cannot change how the row is read. `role` and `content` are keys of a message,
    not columns, and are skipped. Raises ValueError if a column is missing or a template fails.
    """
    sources = {name: source for name, source in (fields or {}).items() if name not in ("role", "content")}
    return {name: _value(row, name, source) for name, source in sources.items()} if sources else row


def _value(row: Row, name: str, source: str) -> Any:
    if "{{" in source or "{%" in source:
        try:
            return _template(source).render(row)
        except Exception as error:  # Jinja's errors, and anything that an expression raises on this row's values
            raise ValueError(
                f"the template of {name} cannot be rendered: {error}; columns: {', '.join(row)}"
            ) from error
    if source not in row:
        raise ValueError(f"there is no column {source} for {name}; the columns are {', '.join(row)}")
    return row[source]


@lru_cache
def _template(source: str) -> Template:
    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
