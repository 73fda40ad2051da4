"""Reads the content of a message: a text, or a list of parts as OpenAI and Anthropic write them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.columns import OUTPUT
from jobs.data.row_values import Names, is_null, kind_of, number_text
from jobs.data.tool_calls import parse_calls

TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("thinking", "reasoning")
COLUMN_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
"""Columns, also nested ones, that a template can name."""


@dataclass
class Content:
    """What one message says."""

    text: str = ""
    thought: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    """Results of tools: {tool_call_id, content, and is_error if it is true}."""


def text_of(raw: object, where: str, fields: Names) -> str:
    """The text of a column: a string, a number, or a list of text parts. Raises ValueError for anything else.

    fields: `data.fields`, which may say that the row has the column under another name.
    """
    if isinstance(raw, str):
        return raw
    content = parse_content(raw, where, "user", fields.get(where, where))
    if content.results:
        raise ValueError(f"{where} holds a tool's result, not only text: use the format messages")
    return content.text


def parse_content(raw: object, where: str, role: str, source: str | None = None) -> Content:
    """The content of a message of this role. Raises ValueError if it is no text and no list of parts.

    source: the row's name of the column, if the content is a column of its own.
    """
    if isinstance(raw, str):
        return Content(raw)
    if isinstance(raw, list | tuple) and not raw and role != "tool":
        return Content()
    if isinstance(raw, list | tuple) and any(isinstance(part, Mapping) and "type" in part for part in raw):
        return _read_parts(list(raw), where, role)
    if role == "tool" and isinstance(raw, list | tuple | Mapping | bool):
        return Content(_as_json(raw, where))
    if (number := number_text(raw)) is not None:
        return Content(number)
    if isinstance(raw, list | tuple) and raw and isinstance(raw[0], Mapping) and ("role" in raw[0] or "from" in raw[0]):
        remedy = "it holds messages, so set data.format=auto" + _names_for_messages(where, source)
    elif template := _template_for(raw, source):
        remedy = f'give a text, or map it with a template such as data.fields.{where}="{template}"'
    else:
        remedy = "give a text, or drop the row"
    raise ValueError(f"{where} is {kind_of(raw)}, not text: {remedy}")


def _names_for_messages(column: str, source: str | None) -> str:
    if source is None or source == "prompt":
        return ""
    if column in OUTPUT:
        return f", and name the columns as in data.fields={{prompt: instruction, completion: {source}}}"
    return f" and data.fields.prompt={source}"


def _template_for(raw: object, source: str | None) -> str | None:
    """A template that makes a text of such a column, to show in a message; None if there is none."""
    if source is None or is_null(raw) or not COLUMN_NAME.fullmatch(source):
        return None
    path, value = source, raw
    while isinstance(value, list | tuple | Mapping) and value:
        is_object = isinstance(value, Mapping)
        key = next(iter(value)) if isinstance(value, Mapping) else 0
        path, value = f"{path}['{key}']" if is_object else f"{path}[0]", value[key]
    if isinstance(value, bool):
        return f"{{{{ 'yes' if {path} else 'no' }}}}"
    return f"{{{{ {path} }}}}" if isinstance(value, str) or number_text(value) else None


def _as_json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}; correct or drop the row") from error


def _read_parts(parts: list[Any], where: str, role: str) -> Content:
    """Parts in the order in which chat templates write them: results, thought, text, calls."""
    content, position = Content(), 0
    for number, part in enumerate(parts):
        here = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXTS or (kind == "refusal" and role == "assistant"):
            content.text += _text_part(part, "refusal" if kind == "refusal" else "text", here)
            rank = 3
        elif kind in THOUGHTS and role == "assistant" and content.thought is None:
            content.thought = _text_part(
                part, next((k for k in (*THOUGHTS, "text") if not is_null(part.get(k))), kind), here
            )
            rank = 2
        elif kind == "tool_use" and role == "assistant":
            content.calls += parse_calls(dict(part), here)
            rank = 4
        elif kind == "tool_result" and role in ("user", "tool"):
            content.results.append(_result(part, here))
            rank = 1
        else:
            shown = kind or (f"{kind_of(part)} without `type`" if isinstance(part, Mapping) else kind_of(part))
            raise ValueError(
                f"{here} is of type {shown}: only text can be trained on (besides one thought and tool calls of the "
                "assistant, and tool results of the user); drop the row, or this part"
            )
        if rank < position:
            raise ValueError(
                f"{here} of type {kind} stands behind a part that chat templates write after it: "
                "split the message where the order changes, or drop the row"
            )
        position = rank
    return content


def _text_part(part: Mapping[str, Any], key: str, where: str) -> str:
    text = part.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}.{key} is {kind_of(text)}, not text: give its text, or drop the part")
    return text


def _result(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    raw, identity = part.get("content"), part.get("tool_use_id")
    if not is_null(identity) and not isinstance(identity, str):
        raise ValueError(f"{where}.tool_use_id is {kind_of(identity)}, not text: give the id of the call")
    text = "" if is_null(raw) else parse_content(raw, f"{where}.content", "tool").text
    result = {"tool_call_id": identity, "content": text}
    return {**result, "is_error": True} if part.get("is_error") else result
