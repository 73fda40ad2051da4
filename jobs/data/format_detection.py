"""Recognizes the format of a row by its columns and the types of their values."""

from collections.abc import Iterator, Mapping
from typing import Any

from conf.columns import INPUT, INSTRUCTION, MESSAGES, OUTPUT
from jobs.data.row_values import Row, first_filled, parse_json, parse_list


def reasons_for_formats(row: Row) -> Iterator[tuple[str, str]]:
    """(format, reason) of each format that could read the row, the most certain first."""
    messages, output = first_filled(row, MESSAGES), first_filled(row, OUTPUT)
    if first_filled(row, ("input_ids",)):
        yield "tokenised", "it has a column input_ids"
    if messages and isinstance(turns := parse_list(row[messages], messages), list | tuple):
        opening = turns[0] if turns and isinstance(turns[0], Mapping) else {}
        name = "sharegpt" if opening.get("from") is not None or opening.get("value") is not None else "messages"
        yield name, f"its column {messages} is a list of turns with the keys {', '.join(opening) or '(none)'}"
        yield "messages", f"its column {messages} is a list of turns"
    if first_filled(row, ("prompt",)):
        if first_filled(row, ("completion",)):
            yield "prompt_completion", "it has the columns prompt and completion"
        elif output and messages_in(row["prompt"], "prompt"):
            yield "prompt_completion", f"its column prompt is a list of turns, and it has a column {output}"
    if isinstance(parse_list(row.get("segments"), "segments"), list):
        yield "segments", "its column segments is a list of texts with labels"
    if output and (question := first_filled(row, INSTRUCTION) or first_filled(row, INPUT)):
        yield "alpaca", f"it has the columns {question} and {output}"
    if isinstance(row.get("text"), str):
        yield "text", "it has a column text"


def messages_in(value: Any, column: str) -> list[Any] | None:
    """The messages that a value or its JSON text holds; None if it is a text."""
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, str):
        start = value.lstrip()[:200]
        names = (f"{quote}{key}{quote}" for quote in "\"'" for key in ("role", "from"))
        if start[:1] != "[" or start[1:].lstrip()[:1] != "{" or value.rstrip()[-1] != "]":
            return None
        if not any(name in start for name in names):
            return None
        value = parse_json(value, column)
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Mapping):
        return None
    has_role = any(key in value[0] for key in ("role", "from"))
    return list(value) if has_role or "type" not in value[0] else None
