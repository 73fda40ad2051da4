"""Reads the rows of Parquet and Arrow files, without what Arrow adds to them.

Arrow gives all structs of a column the same keys, and fills those that a row does not have with null. So a key of a struct
whose value is null is left out here. Null columns and null items of lists stay.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, BinaryIO

from conf.errors import DataError, Problem
from jobs.data.file_readers import BLOCK_ROWS, Unreadable

Convert = Callable[[Any], Any]


def parquet_rows(opened: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    """(number, row) of all rows of a Parquet file, numbered from 1."""
    import pyarrow.parquet as parquet

    def batches() -> Any:
        # Without these two options memory grows with the row group, which may be the whole file.
        return parquet.ParquetFile(opened, pre_buffer=False, buffer_size=2**20).iter_batches(batch_size=BLOCK_ROWS)

    yield from _numbered_rows(file, batches)


def arrow_rows(opened: BinaryIO, file: str) -> Iterator[tuple[int, Any]]:
    """(number, row) of all rows of an Arrow file, or of the Arrow stream format that `datasets` writes."""
    import pyarrow as arrow

    def batches() -> Any:
        try:
            reader = arrow.ipc.open_file(opened)
            return (reader.get_batch(number) for number in range(reader.num_record_batches))
        except arrow.ArrowInvalid:
            opened.seek(0)
            return arrow.ipc.open_stream(opened)

    yield from _numbered_rows(file, batches)


def _numbered_rows(file: str, open_batches: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    import pyarrow as arrow

    try:
        yield from enumerate((row for batch in open_batches() for row in plain_rows(batch, file)), 1)
    except (arrow.ArrowException, OSError, OverflowError) as error:
        message = f"is damaged, or its content does not match its file ending: {error}"
        raise DataError(Problem("data.path", file, message)) from error


def plain_rows(batch: Any, source: str) -> Iterator[Any]:
    """The rows of a record batch or table as JSON would give them; an Unreadable for a row that JSON could not give."""
    names = batch.schema.names
    if repeated := next((name for name in names if names.count(name) > 1), None):
        message = f"has the column {repeated!r} twice: rename or remove one of them"
        raise DataError(Problem("data.path", source, message))
    converts = {field.name: convert for field in batch.schema if (convert := _converter(field.type))}
    for row in batch.to_pylist():
        try:
            for name, convert in converts.items():
                row[name] = convert(row[name])
        except ValueError as error:
            yield Unreadable(f"has a column {name} that cannot be read: {error}")
            continue
        yield row


def _converter(kind: Any) -> Convert | None:
    """What turns a value of this Arrow type into what JSON would give; None if it is that already."""
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _from_json if kind.extension_name == "arrow.json" else _converter(kind.storage_type)
    if types.is_struct(kind):
        return _struct({kind.field(index).name: _converter(kind.field(index).type) for index in range(kind.num_fields)})
    if types.is_map(kind):
        return _map(_converter(kind.item_type) or _same)
    if hasattr(kind, "value_field"):  # every kind of list
        item = _converter(kind.value_type)
        return None if item is None else _list(item)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_decimal(kind):
        return _number
    if types.is_temporal(kind):
        return _date_text
    return None


def _same(value: Any) -> Any:
    return value


def _struct(fields: dict[str, Convert | None]) -> Convert:
    converts = {name: convert or _same for name, convert in fields.items()}

    def convert(value: Any) -> Any:
        if value is None:
            return None
        return {name: converts[name](item) for name, item in value.items() if item is not None}

    return convert


def _list(convert: Convert) -> Convert:
    return lambda value: None if value is None else [convert(item) for item in value]


def _map(convert: Convert) -> Convert:
    """For a list of pairs. Its keys are the row's own, so that their nulls stay."""

    def to_dict(value: Any) -> Any:
        if value is None:
            return None
        row = {str(name): convert(item) for name, item in value}
        if len(row) != len(value):
            raise ValueError("a map has a key twice")
        return row

    return to_dict


def _number(value: Decimal | None) -> Any:
    """A decimal as the number that JSON would give; as text if a float does not have all of its digits."""
    if value is None:
        return None
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else str(value)


def _date_text(value: Any) -> Any:
    """A date, time or duration as text: 2026-11-28 or 2026-11-28T10:00:00."""
    return (
        value.isoformat() if isinstance(value, datetime.date | datetime.time) else None if value is None else str(value)
    )


def _from_json(value: str | None) -> Any:
    return None if value is None else json.loads(value)
