"""The common form of a row, whatever its format: turns of a chat with tools, parts of plain text, or token ids."""

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
"""Known speaker names and their roles. A turn of `function_call` is an assistant turn with the call as its content."""

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
TRAIN_KEYS = ("train", "training", "weight", "loss")
"""Keys that say whether to train on a turn: two of Axolotl, one of OpenAI, one of ms-swift."""


class UnknownRole(ValueError):
    """The speaker of a turn is in neither `ROLES` nor the roles given by the config."""


class EmptyText(ValueError):
    """A question or an answer has no text."""


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    """system, developer, user, assistant or tool."""
    content: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    """Tool calls of the assistant: {type: function, function: {name, arguments: a dict, or the JSON text that the row has}},
    plus `id` if the row has one."""
    name: str | None = None
    train: bool | None = None
    """Whether to train on this turn. None: the mask (`data.mask`) decides."""
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    is_null: bool = False
    """Whether the row's content is null. `template_inputs` decides whether the template gets null, no content, or an empty text."""
    is_absent: bool = False
    """Whether the template gets no content at all, as `apply_chat_template` does with null."""
    train_detail: tuple[tuple[int, int, bool], ...] = ()
    """(begin, end, whether to train on them) of characters of the content; they win over `train` and the mask."""
    extra: Mapping[str, Any] | None = None
    """Further keys of the message, which a template may read."""

    def message(self) -> dict[str, Any]:
        """The turn as `apply_chat_template` takes it: without the keys that have no value."""
        message: dict[str, Any] = {"role": self.role}
        if not self.is_absent:
            message["content"] = None if self.is_null else self.content
        if self.tool_calls is not None:
            message["tool_calls"] = self.tool_calls
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message if self.extra is None else {**self.extra, **message}


@dataclass(frozen=True)
class Sample:
    """One row. Exactly one of these is set: `turns` (with `tools`), `parts`, or `ids`."""

    turns: tuple[Turn, ...] = ()
    tools: list[dict[str, Any]] | None = None
    parts: tuple[tuple[str, bool], ...] = ()
    """Plain text as (part, whether to train on it), in order."""
    ids: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    """As long as `ids`: the same token, or -100 to ignore it. Not shifted. None trains on all ids."""
    documents: list[dict[str, Any]] | None = None
    """Documents that the chat template writes before the turns."""
    template_kwargs: Mapping[str, Any] | None = None
    """The row's own variables for the chat template. They win over `data.template_kwargs`."""


def parse_turn(message: object, where: str, fields: Mapping[str, str], roles: Mapping[str, str]) -> Turn:
    """Convert one message to a Turn. Raises ValueError; its message names `where`, e.g. `messages[0]`.

    fields: the message's keys for `role` and `content`, if they are unusual. roles: roles of further speaker names.
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
    reasoning = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    if role == "assistant" and not (content.strip() or calls or reasoning):
        raise EmptyText(f"{where}.{key or 'content'} is empty: there is nothing to train on; drop the row")
    return Turn(
        role, content, calls, message.get("name"), _train(message, where), message.get("tool_call_id"), reasoning
    )


def content_text(raw: object, where: str) -> str:
    """The text of a string or a list of text parts. Other JSON values, such as a tool's result, are written as JSON."""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list) and any(isinstance(part, Mapping) and "type" in part for part in raw):
        return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(raw))
    if isinstance(raw, list | Mapping | int | float):
        return json.dumps(raw, ensure_ascii=False)
    raise ValueError(f"{where} is {_kind(raw)}, not text: give a string or a list of text parts")


def parse_tools(raw: object) -> list[dict[str, Any]] | None:
    """Tools from a list, or from JSON text. Wraps bare functions as {type: function, function: ...}. None if there are none."""
    if isinstance(raw, str):
        raw = _json(raw, "tools") if raw.strip() else None
    if not raw:
        return None
    tools = []
    for number, tool in enumerate(raw if isinstance(raw, list) else [raw]):
        if isinstance(tool, str):
            tool = _json(tool, f"tools[{number}]")
        if not isinstance(tool, Mapping) or not ("function" in tool or "name" in tool):
            raise ValueError(
                f"tools[{number}] is not a function schema: it needs `name` and `parameters`, or `function`"
            )
        tools.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tools


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.text is {_kind(part.get('text'))}, not text: give its text, or drop the part")
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise ValueError(f"{where} is of type {kind}: only text can be trained on; drop the row, or this part")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _key(message: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` with a value, else the first that is present: Arrow fills absent keys with null."""
    for name in names:  # A loop, not a generator: this runs for many keys of every row (also in formats.py).
        if message.get(name) is not None:
            return name
    return next((name for name in names if name in message), None)


def _role(
    message: Mapping[str, Any], where: str, fields: Mapping[str, str], roles: Mapping[str, str]
) -> tuple[str, str]:
    key = _key(message, (fields["role"],) if "role" in fields else ROLE_KEYS)
    if key is None:
        raise ValueError(f"{where} has no role among its keys {sorted(message)}: name the key in data.fields.role")
    speaker = roles.get(str(message[key]), str(message[key]))
    role = ROLES.get(speaker.lower())
    if role is None:
        known = ", ".join(sorted(set(ROLES) | set(roles)))
        raise UnknownRole(
            f"{where}.{key} is {message[key]!r}, an unknown role: map it with data.roles to one of {known}"
        )
    return role, speaker.lower()


def _train(message: Mapping[str, Any], where: str) -> bool | None:
    if detail := next((key for key in ("train_detail", "training_detail") if message.get(key)), None):
        raise ValueError(
            f"{where}.{detail} marks parts of a turn, which is not supported: split the turn and set `train` on each part"
        )
    key = _key(message, TRAIN_KEYS)
    if key is None or message[key] is None:
        return None
    if message[key] not in (0, 1):
        raise ValueError(
            f"{where}.{key} is {message[key]!r}: give true or false (or 1 or 0) to say whether to train on the turn"
        )
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
    """One call, with its arguments as a dict: templates write arguments as JSON and would quote a JSON string again."""
    inner = raw.get("function", raw) if isinstance(raw, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where} is not a tool call: it needs `name` and `arguments`")
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
    except ValueError as error:  # Python's limit on the number of digits of an integer
        raise ValueError(f"{where} is not valid JSON ({error}): {text[:60]!r}") from error
