"""Reads tool schemas and tool calls in the shapes of OpenAI, Anthropic, LangChain, TRL, LLaMA-Factory and ms-swift."""

from collections.abc import Mapping
from typing import Any

from jobs.data.row_values import check_json, check_json_object, is_filled, is_null, kind_of, parse_json

ARGUMENTS = ("arguments", "parameters", "input", "args")
"""Keys of a call's arguments: OpenAI's, Llama's, Anthropic's and LangChain's."""
CALL_TYPES = ("function", "tool_use", "tool_call")
CALL_PARTS = (*ARGUMENTS, "name", "type", "id", "index", "function", "caller", "cache_control", "call_id")
"""Keys of a call that hold no argument under another name."""


def parse_tools(raw: object) -> list[dict[str, Any]] | None:
    """Tools from a list, or from JSON text. Wraps bare functions as {type: function, function: ...}. None if there are none."""
    if isinstance(raw, str):
        raw = parse_json(raw, "tools") if raw.strip() else None
    if not raw:
        return None
    return [_tool(tool, f"tools[{number}]") for number, tool in enumerate(raw if isinstance(raw, list) else [raw])]


def _tool(tool: object, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json(tool, where)
    if not isinstance(tool, Mapping) or (is_null(tool.get("function")) and is_null(tool.get("name"))):
        raise ValueError(f"{where} is not a function schema: it needs `name` and `parameters`, or `function`")
    check_json(tool, where)
    if is_null(tool.get("function")):  # the function itself; Anthropic calls its parameters input_schema
        function = {key: value for key, value in tool.items() if key not in ("type", "function")}
        if "input_schema" in function and is_null(function.get("parameters")):
            function["parameters"] = function.pop("input_schema")
        wrapper: dict[str, Any] = {"type": "function"}
    else:
        function, wrapper = tool["function"], dict(tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is not a function schema: its function has no `name` that is a text")
    if isinstance(parameters := function.get("parameters"), str):
        function = {**function, "parameters": parse_json(parameters, f"{where}.function.parameters")}
    return {**wrapper, "function": dict(function)}


def parse_calls(raw: object, where: str) -> list[dict[str, Any]]:
    """Calls from a list, from one call, or from JSON text of either. The arguments stay as the row has them: object or text."""
    raw = parse_json(raw, where) if isinstance(raw, str) else raw
    return [_call(call, f"{where}[{number}]") for number, call in enumerate(raw if isinstance(raw, list) else [raw])]


def _call(raw: object, where: str) -> dict[str, Any]:
    raw = parse_json(raw, where) if isinstance(raw, str) else raw
    inner = raw.get("function") or raw if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where} is not a tool call: it needs `name` and `arguments`")
    if raw.get("type") not in (None, *CALL_TYPES):
        raise ValueError(f"{where}.type is {raw['type']!r}: only calls of functions can be trained on; drop the row")
    whole = {key: value for part in (raw, inner) for key, value in part.items() if not is_null(value)}
    name = _arguments_key(whole, where)
    arguments = {} if name is None else _arguments(whole[name], f"{where}.{name}")
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return call if is_null(raw.get("id")) else {"id": raw["id"], **call}


def _arguments_key(call: Mapping[str, Any], where: str) -> str | None:
    """The key that holds the arguments; None if the call has none. Raises ValueError if they may be under an unknown key.

    call: without nulls.
    """
    filled = [name for name in ARGUMENTS if is_filled(call.get(name))]
    if len(filled) > 1 and any(call[name] != call[filled[0]] for name in filled[1:]):
        raise ValueError(f"{where} has both {filled[0]} and {filled[1]}, which differ: remove one of them")
    if present := filled or [name for name in ARGUMENTS if name in call]:
        return present[0]
    if unknown := next((key for key, value in call.items() if key not in CALL_PARTS and is_filled(value)), None):
        raise ValueError(
            f"{where} has no `arguments`, but a key {unknown}, which nothing reads: rename it to `arguments`, or remove it"
        )
    return None


def _arguments(value: object, where: str) -> object:
    if isinstance(value, str):
        if not value.strip():
            return {}
        check_json_object(value, where)
    elif isinstance(value, Mapping):
        check_json(value, where)
    else:
        raise ValueError(f"{where} is {kind_of(value)}, not an object: give {{name: value}} for each argument")
    return value
