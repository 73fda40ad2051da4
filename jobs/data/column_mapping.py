"""Gives a row of any schema the columns that a format wants: by their names, or by a Jinja text over the row."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

Row = Mapping[str, Any]
Names = Mapping[str, str]
"""A renaming: of columns, or of roles."""


def mapped(row: Row, fields: Names | None) -> Row:
    """The row as the format names its columns. Only mapped columns are kept: what the user did not name is not looked at."""
    wanted = {name: source for name, source in (fields or {}).items() if name not in ("role", "content")}
    return {name: _value(row, name, source) for name, source in wanted.items()} if wanted else row


def _value(row: Row, name: str, source: str) -> Any:
    if "{{" in source or "{%" in source:
        try:
            return _template(source).render(row)
        except Exception as error:  # Jinja's own, and whatever the expressions raise on this row's values
            raise ValueError(
                f"the template of {name} cannot be rendered: {error}; columns: {', '.join(row)}"
            ) from error
    if source not in row:
        raise ValueError(f"there is no column {source} for {name}; the columns are {', '.join(row)}")
    return row[source]


@lru_cache
def _template(source: str) -> Template:
    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
