"""Renames the columns of a row to those that a format expects (`data.fields`), by name or by a Jinja template over the row."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.filters import FILTERS
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import missing

from conf.columns import COLUMNS, FORMAT_COLUMNS, KEYS, MESSAGE_KEYS
from jobs.data.row_values import Names, Row, is_null

GROUPS = {name: group for groups in FORMAT_COLUMNS.values() for group in groups for name in group}
OPTIONAL = "?"
"""Ends the name of a column that rows may lack, as in `data.fields.tools="functions?"`."""
KEY_GROUPS = {name: group for group in MESSAGE_KEYS for name in group}


def map_columns(row: Row, fields: Names) -> dict[str, Any]:
    """The row with the columns that `fields` names, under the format's names, and its other columns.

    A column that is mapped, or that a template reads, no longer has its own name in the result. If `output` is mapped, the
    row's columns with other names of it (`response`, `answer`) are left out too. A column that the row lacks is null. Keys of
    messages are skipped; see `rename_keys`.
    Raises ValueError if a key of `fields` is unknown or a template fails.
    """
    plan = _plan(tuple(fields.items()))
    mapped = {name: _value(row, name, source) for name, source in plan.mapped}
    replaced = plan.replaced
    if plan.paths:
        replaced = replaced | {path.partition(".")[0] for path in plan.paths if path not in row}
    return {**{name: value for name, value in row.items() if name not in replaced}, **mapped}


class _Plan(NamedTuple):
    """What a mapping does to every row."""

    mapped: tuple[tuple[str, str], ...]
    """(the format's column, what it is made of)."""
    replaced: frozenset[str]
    """Columns that are not read under their own names."""
    paths: tuple[str, ...]
    """Sources with a dot, which may name a nested column."""


@lru_cache
def _plan(fields: tuple[tuple[str, str], ...]) -> _Plan:
    check_names(dict(fields))
    mapped = tuple((name, source) for name, source in fields if name in COLUMNS)
    replaced = {name for column, source in mapped for name in (*GROUPS[column], *_columns(column, source))}
    paths = tuple(source.removesuffix(OPTIONAL) for _, source in mapped if "." in source and not is_template(source))
    return _Plan(mapped, frozenset(replaced), paths)


def _columns(name: str, source: str) -> tuple[str, ...]:
    if not is_template(source):
        return (source, source.removesuffix(OPTIONAL))
    try:
        return _template(source)[1]
    except TemplateError as error:
        raise ValueError(f"the template of {name} cannot be rendered: {error} in {source!r}") from error


def rename_keys(message: Mapping[str, Any], fields: Names) -> dict[str, Any]:
    """A message with the keys that `fields` names under Muster's names. A mapped key replaces its other names."""
    sources = {name: source.removesuffix(OPTIONAL) for name, source in fields.items() if name in KEYS}
    mapped = {name: message.get(source) for name, source in sources.items()}
    replaced = {*sources.values(), *(other for name in mapped for other in KEY_GROUPS[name])}
    return {**{name: value for name, value in message.items() if name not in replaced}, **mapped}


def check_names(fields: Names) -> None:
    """Raise ValueError if `fields` has a key that is neither a column of a format nor a key of a message."""
    if not fields.keys() <= COLUMNS | KEYS:
        unknown = next(name for name in fields if name not in COLUMNS | KEYS)
        raise ValueError(
            f"data.fields.{unknown} is neither a column of a format ({', '.join(sorted(COLUMNS, key=str.lower))}) "
            f"nor a key of a message ({', '.join(sorted(KEYS))}): correct the name"
        )


def is_template(source: str) -> bool:
    return "{{" in source or "{%" in source


def sources(row: Row, source: str) -> tuple[str, ...]:
    """The top-level columns that the right side of a mapping reads."""
    if is_template(source):
        return _template(source)[1]
    return (source,) if source in row else (source.removesuffix(OPTIONAL).partition(".")[0],)


def lacks(row: Row, source: str) -> list[str]:
    """The columns that the right side of a mapping reads and the row does not have."""
    if is_template(source):
        return [name for name in _template(source)[1] if name not in row]
    return [] if source.endswith(OPTIONAL) or _find(row, source) is not missing else [source]


def _value(row: Row, name: str, source: str) -> Any:
    if not is_template(source):
        value = _find(row, source)
        return None if value is missing else value
    try:
        template, columns = _template(source)
        if columns and all(is_null(row.get(column)) for column in columns):
            return None
        return template.render({column: _without_nulls(row[column]) for column in columns if column in row})
    except Exception as error:  # Jinja's errors, and anything that an expression raises on this row's values
        raise ValueError(f"the template of {name} cannot be rendered: {error}; columns: {', '.join(row)}") from error


def _find(row: Row, path: str) -> Any:
    """The value of a column, or of a nested one such as `data.messages`; `missing` if the row does not have it."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.removesuffix(OPTIONAL).split("."):
        if not isinstance(value, Mapping) or name not in value:
            return missing
        value = value[name]
    return value


class _Null(str):
    """A null in a template: an empty text wherever it is written, but still none for tests and null for `tojson`."""

    def __eq__(self, other: object) -> bool:
        return other is None or other == ""

    def __hash__(self) -> int:
        return hash("")


NULL = _Null()


class _List(list[Any]):
    """A list in a template, which may be joined or indexed, but not written as it is."""

    def __str__(self) -> str:
        raise TypeError(
            "a list is not text: choose an item such as [0], or write `| join(', ')` or `| tojson` behind it"
        )

    __repr__ = __str__


class _Object(dict[str, Any]):
    """An object in a template, of which single keys may be written, but not the whole."""

    def __str__(self) -> str:
        raise TypeError("an object is not text: choose one of its keys, or write `| tojson` behind it")

    __repr__ = __str__


def _without_nulls(value: Any) -> Any:
    """The value with NULL for each null in it, and with lists and objects that refuse to be written as Python prints them."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _Object({key: _without_nulls(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return _List(map(_without_nulls, value))
    return NULL if is_null(value) else value


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, _Null) else value


for _type, _name in ((_List, "list"), (_Object, "dict")):  # as Jinja's messages name it
    _type.__module__, _type.__name__ = "builtins", _name


class _AbsentColumn(StrictUndefined):
    """A column that the row lacks: empty like null, but `is defined` is false. A key that a nested object lacks is an error."""

    def _if_column(self, value: Any) -> Any:
        if self._undefined_obj is not missing:
            self._fail_with_undefined_error()
        return value

    def __str__(self) -> str:  # type: ignore[override]
        return str(self._if_column(""))

    def __iter__(self) -> Any:
        return iter(self._if_column(()))

    def __len__(self) -> int:  # type: ignore[override]
        return int(self._if_column(0))

    def __bool__(self) -> bool:  # type: ignore[override]
        return bool(self._if_column(False))


def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(
        undefined=_AbsentColumn, keep_trailing_newline=True, finalize=lambda value: "" if value is None else value
    )
    environment.tests["none"] = lambda value: value is None or isinstance(value, _Null)
    to_json: Callable[..., Any] = FILTERS["tojson"]

    def tojson(context: Any, value: Any, indent: int | None = None) -> Any:
        return to_json(context, _with_nulls(value), indent)

    tojson.jinja_pass_arg = to_json.jinja_pass_arg  # type: ignore[attr-defined]
    environment.filters["tojson"] = tojson
    return environment


@lru_cache
def _template(source: str) -> tuple[Template, tuple[str, ...]]:
    """(the template, the columns that it reads)."""
    environment = _environment()
    text = _with_newlines(source)
    columns = sorted(meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys())
    return environment.from_string(text), tuple(columns)


def _with_newlines(source: str) -> str:
    r"""The template with a newline for each \n outside its expressions, since a shell passes \n as two characters. \\n stays \n."""
    parts = re.split(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})", source, flags=re.DOTALL)
    parts[::2] = [re.sub(r"\\(\\?n)", lambda match: "\n" if match[1] == "n" else r"\n", part) for part in parts[::2]]
    return "".join(parts)


def check_sources(fields: Names, rows: Iterable[Row], lists_of: Callable[[Row], Iterable[Any]]) -> None:
    """Raise ValueError if none of these rows has a column that `fields` names, or no message a key that it names.

    lists_of: gives the messages of a row, whose columns are mapped already.
    """
    check_names(fields)
    rows = list(rows)
    if not rows:
        return
    for name, source in fields.items():
        if name in COLUMNS:
            absent = set(lacks(rows[0], source)).intersection(*(lacks(row, source) for row in rows[1:]))
            if absent:
                columns = dict.fromkeys(column for row in rows for column in row)
                column, in_template = sorted(absent)[0], is_template(source)
                _refuse_absent(column, f"data.fields.{name}", "column", len(rows), columns, in_template=in_template)
    if keys := [name for name in fields if name in KEYS]:
        messages = [message for row in rows for message in lists_of(map_columns(row, fields))]
        found = dict.fromkeys(key for message in messages if isinstance(message, Mapping) for key in message)
        for name in keys:
            if fields[name] not in found and not fields[name].endswith(OPTIONAL):
                _refuse_absent(fields[name], f"data.fields.{name}", "key of a message", len(rows), found)


def _refuse_absent(
    source: str, key: str, kind: str, count: int, present: Iterable[str], *, in_template: bool = False
) -> None:
    where = "the first row" if count == 1 else f"any of the first {count} rows"
    optional = (
        f"give one of these rows {source} with null" if in_template else f'write {key}="{source}?" if rows may lack it'
    )
    raise ValueError(
        f"there is no {kind} {source} for {key} in {where}, which have {', '.join(present) or 'none'}: correct the name, "
        f"or {optional}"
    )
