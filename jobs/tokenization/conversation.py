"""The one form that rows of every shape become: turns of a chat with tools, parts of plain text, or finished tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
"""Every speaker's name we know, and its role; `function_call` is an assistant's turn whose content is the call."""

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
TRAIN_KEYS = ("train", "training", "weight", "loss")
"""Axolotl's two, OpenAI's, ms-swift's: whether a turn is learnt."""


class UnknownRole(ValueError):
    """A speaker that nobody has named."""


class Empty(ValueError):
    """A question or an answer without text."""


@dataclass(frozen=True)
class Turn:
    role: str
    """system, user, assistant or tool."""
    content: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    """An assistant's calls: {type: function, function: {name, arguments: a dict}}, with an id where the row has one."""
    name: str | None = None
    train: bool | None = None
    """Whether this turn is learnt; null leaves it to the mask policy."""
    tool_call_id: str | None = None
    reasoning_content: str | None = None


@dataclass(frozen=True)
class Sample:
    """One row: `turns` and `tools`, or `parts`, or `ids`."""

    turns: tuple[Turn, ...] = ()
    tools: list[dict[str, Any]] | None = None
    parts: tuple[tuple[str, bool], ...] = ()
    """Plain text in order, each part with whether it is learnt."""
    ids: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    """As long as `ids`, the same token or -100; not shifted."""


def turn(message: object, where: str, fields: Mapping[str, str], roles: Mapping[str, str]) -> Turn:
    """One turn from a message of any spelling. Raises ValueError naming `where`.

    fields: the keys of `role` and `content` where they are unusual. roles: further speakers, by name.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {message!r}, not an object with a role and content")
    role, speaker = _role(message, where, fields, roles)
    calls = _calls(message, where)
    key = _key(message, (fields["content"],) if "content" in fields else CONTENT_KEYS)
    raw = None if key is None else message[key]
    if speaker == "function_call" and not calls:
        calls, raw = _parsed_calls(raw, f"{where}.{key}"), ""
    if raw is None and not calls:
        raise ValueError(f"{where}.{key or 'content'} is null: give its text, or drop the row")
    content = content_text(raw, f"{where}.{key}") if raw is not None else ""
    thought = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    if role == "assistant" and not (content.strip() or calls or thought):
        raise Empty(f"{where}.{key or 'content'} is empty: there is nothing to learn; drop the row")
    return Turn(role, content, calls, message.get("name"), _train(message, where), message.get("tool_call_id"), thought)


def content_text(raw: object, where: str) -> str:
    """The text of a string, of a list of text parts, or of a tool's result given as an object."""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list) and any(isinstance(part, Mapping) and "type" in part for part in raw):
        return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(raw))
    if isinstance(raw, list | Mapping | int | float):
        return json.dumps(raw, ensure_ascii=False)
    raise ValueError(f"{where} is {_kind(raw)}, not text: give a string or a list of text parts")


def tool_list(raw: object) -> list[dict[str, Any]] | None:
    """Tools from a list or its JSON, bare functions wrapped as {type: function, function: ...}. None where there are none."""
    if isinstance(raw, str):
        raw = _json(raw, "tools") if raw.strip() else None
    if not raw:
        return None
    found = []
    for number, tool in enumerate(raw if isinstance(raw, list) else [raw]):
        if isinstance(tool, str):
            tool = _json(tool, f"tools[{number}]")
        if not isinstance(tool, Mapping) or not ("function" in tool or "name" in tool):
            raise ValueError(
                f"tools[{number}] is no function's schema: it needs `name` and `parameters`, or `function`"
            )
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return found


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.text is {_kind(part.get('text'))}, not text: give its text, or drop the part")
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise ValueError(f"{where} is of type {kind}: only text is trained on; drop the row, or the part")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _key(message: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` with a value; else the first that is there at all (Arrow fills absent keys with null)."""
    for name in names:  # no generators here and in formats.py: a row asks for many keys
        if message.get(name) is not None:
            return name
    return next((name for name in names if name in message), None)


def _role(
    message: Mapping[str, Any], where: str, fields: Mapping[str, str], roles: Mapping[str, str]
) -> tuple[str, str]:
    key = _key(message, (fields["role"],) if "role" in fields else ROLE_KEYS)
    if key is None:
        raise ValueError(f"{where} has no role among its keys {sorted(message)}: say which key holds it")
    speaker = roles.get(str(message[key]), str(message[key]))
    role = ROLES.get(speaker.lower())
    if role is None:
        known = ", ".join(sorted(set(ROLES) | set(roles)))
        raise UnknownRole(f"{where}.{key} is {message[key]!r}, an unknown role: map it to one of {known}")
    return role, speaker.lower()


def _train(message: Mapping[str, Any], where: str) -> bool | None:
    if detail := next((key for key in ("train_detail", "training_detail") if message.get(key)), None):
        raise ValueError(
            f"{where}.{detail} marks parts of a turn, which is not supported: split the turn, and use `train`"
        )
    key = _key(message, TRAIN_KEYS)
    if key is None or message[key] is None:
        return None
    if message[key] not in (0, 1):
        raise ValueError(f"{where}.{key} is {message[key]!r}: a turn is learnt or not; give true or false, 1 or 0")
    return bool(message[key])


def _calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    if message.get("tool_calls"):
        return _parsed_calls(message["tool_calls"], f"{where}.tool_calls")
    if message.get("function_call"):
        return _parsed_calls(message["function_call"], f"{where}.function_call")
    return None


def _parsed_calls(raw: object, where: str) -> list[dict[str, Any]]:
    raw = _json(raw, where) if isinstance(raw, str) else raw
    return [_call(call, f"{where}[{number}]") for number, call in enumerate(raw if isinstance(raw, list) else [raw])]


def _call(raw: object, where: str) -> dict[str, Any]:
    """A call with its arguments as a dict: templates write them as JSON, so a JSON string would be quoted twice."""
    inner = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where} is no call: it needs `name` and `arguments`")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}.arguments") if arguments.strip() else {}
    call = {
        "type": "function",
        "function": {"name": inner["name"], "arguments": {} if arguments is None else arguments},
    }
    return {"id": raw["id"], **call} if isinstance(raw, Mapping) and raw.get("id") else call


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error.msg} at column {error.colno}): {text[:60]!r}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not valid JSON (nested too deeply): {text[:60]!r}") from error
    except ValueError as error:  # Python's limit on the digits of a number
        raise ValueError(f"{where} is not valid JSON ({error}): {text[:60]!r}") from error
