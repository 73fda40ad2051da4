"""Reads the messages of a chat into turns, with the keys and roles of OpenAI, Axolotl, LLaMA-Factory, ms-swift and TRL."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from conf.columns import CALL_KEYS, CONTENT_KEYS, KEYS, ROLE_KEYS, ROLES
from jobs.data.column_mapping import rename_keys
from jobs.data.content_parts import Content, parse_content
from jobs.data.refused_rows import media_column
from jobs.data.row_values import Names, is_filled, is_null, kind_of, number_text, parse_list, short
from jobs.data.thoughts import read_thought, split_thought
from jobs.data.tool_calls import parse_calls
from jobs.data.train_marks import check_train_detail, read_train, read_train_detail, refuse_other_marks, without_gaps
from jobs.tokenization.conversation import EmptyText, Turn, UnknownRole

CALL_SPEAKERS = ("function_call", "tool_call")
"""The content of a turn of these speakers is one call, or a list of calls, as JSON."""
THOUGHT_SPEAKERS = ("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "think")
PLAIN_ROLES = {name: role for name, role in ROLES.items() if name not in CALL_SPEAKERS}
PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
"""Keys of a question and its answer in one object, as in Firefly's and XTuner's chats."""
PAIR_KEYS = {name for pair in PAIRS for name in pair} | {"system", "output_with_loss"}


class Reading(NamedTuple):
    """How the config wants rows to be read: the values of `data.fields`, `roles`, `ignore` and `split_thinking`."""

    fields: Names = {}
    roles: Names = {}
    ignore: frozenset[str] = frozenset()
    split_thinking: bool = False
    trained: bool = True
    """Whether answers are trained unless they say otherwise."""


def parse_turns(raw: object, column: str, reading: Reading) -> list[Turn]:
    """The turns of a list of messages, or of its JSON text. Raises ValueError; its message names e.g. `messages[0].content`."""
    raw = parse_list(raw, column)
    if not isinstance(raw, list | tuple) or not raw:
        what = "empty" if isinstance(raw, list | tuple) else "not a list"
        raise ValueError(f"{column} is {what}: give a list of messages with roles")
    turns: list[Turn] = []
    after_call = False  # whether the last turn came from a message that is nothing but a call
    keys = {name: key for name, key in reading.fields.items() if name in KEYS} if reading.fields else {}
    plain_keys = (keys.get("role"), keys.get("content")) if keys.keys() <= {"role", "content"} else None
    for number, message in enumerate(raw):
        turn = _plain_turn(message, reading.roles, *plain_keys) if plain_keys else None
        if turn is not None and not (reading.split_thinking and "<" in turn.content):
            turns.append(turn)
            after_call = False
            continue
        where = f"{column}[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{where} is {short(message)}, not an object with a role and content: give {{role, content}} for each message"
            )
        message = {key: value for key, value in message.items() if key not in reading.ignore}
        message = rename_keys(message, keys) if keys else message
        if pair := _pair_of(message):
            turns += _pair_turns(message, pair, where)
            after_call = False
            continue
        role, speaker = _role(message, where, reading)
        new = _turns_of(message, role, speaker, where, reading, turns)
        is_call = speaker in CALL_SPEAKERS
        if is_call and turns and turns[-1].role == "assistant" and (after_call or not turns[-1].tool_calls):
            new = [_join_call(turns.pop(), new[0], where)]
        turns += new
        after_call = is_call
    return turns


def _plain_turn(message: object, roles: Names, role_key: str | None, content_key: str | None) -> Turn | None:
    """The turn of a message with a known role and a text, and nothing else, which most messages are. None for all others.

    role_key, content_key: the keys that `data.fields` names.
    """
    if type(message) is not dict:
        return None
    if len(message) != 2 and len(message := {key: value for key, value in message.items() if value is not None}) != 2:
        return None
    speaker, content = message.get(role_key or "role"), message.get(content_key or "content")
    if content is None and role_key is None and content_key is None:
        speaker, content = message.get("from"), message.get("value")
    if type(content) is not str or type(speaker) is not str or not content or content.isspace():
        return None
    role = PLAIN_ROLES.get(roles.get(speaker, speaker) if roles else speaker)
    return None if role is None else Turn(role, content)


def _turns_of(
    message: dict[str, Any], role: str, speaker: str, where: str, reading: Reading, before: Sequence[Turn]
) -> list[Turn]:
    """The turns of one message: one, or several if it holds results of tools."""
    refuse_other_marks(message, where)
    train, detail = read_train(message, where), read_train_detail(message, where)
    calls = _calls(message, where)
    key, raw = _content(message, where, role)
    content = Content()
    if speaker in CALL_SPEAKERS and not calls:
        if is_null(raw):
            raise ValueError(f"{where}.{key or 'content'} is null: give the call as JSON, or drop the row")
        calls, raw = parse_calls(raw, f"{where}.{key}"), None
    elif not is_null(raw):
        content = parse_content(raw, f"{where}.{key}", role)
    if content.calls and calls:
        raise ValueError(f"{where} has calls both in its content and in tool_calls: keep one of them")
    calls = calls or content.calls
    text, thought = content.text, read_thought(message, role, content.thought, where)
    if reading.split_thinking and role == "assistant":
        text, thought = split_thought(text, thought, f"{where}.{key}", has_detail=bool(detail))
    if is_null(raw) and not (calls or (thought and role == "assistant")):
        missing = f"{key} is null" if key else f"content is null (its keys are {', '.join(message)})"
        remedy = "give its text, or drop the row" if key else "name the key in data.fields.content, or drop the row"
        raise ValueError(f"{where}.{missing}: {remedy}")
    results = [_result_turn(result, before) for result in content.results]
    if results and not text:
        return results
    is_trained = train is not False and (reading.trained or train is not None)
    if not text.strip() and (
        role == "user" or (role == "assistant" and is_trained and not (calls or (thought or "").strip()))
    ):
        what = "there is no question" if role == "user" else "there is nothing to train on"
        raise EmptyText(f"{where}.{key or 'content'} is empty: {what}; drop the row")
    check_train_detail(detail, raw, text, where)
    return [
        *results,
        Turn(
            role,
            text,
            calls or None,
            _text_key(message, "name", where),
            (True if detail and train is None else train),
            _text_key(message, "tool_call_id", where),
            thought,
            is_null=is_null(raw),
            train_detail=() if train is False else without_gaps(detail, len(text)),
            extra=_extra(message, where),
        ),
    ]


def _calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    filled = [key for key in CALL_KEYS if is_filled(message.get(key)) and message[key] != "null"]
    if len(filled) > 1:
        raise ValueError(f"{where} has both {' and '.join(filled)}: remove one, or set data.ignore=[{filled[1]}]")
    return parse_calls(message[filled[0]], f"{where}.{filled[0]}") if filled else []


def _key_of(message: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """The key among `names` that has a value, else the first that is there. Raises ValueError if two values differ."""
    filled = [name for name in names if not is_null(message.get(name))]
    if len(filled) > 1 and any(message[name] != message[filled[0]] for name in filled[1:]):
        raise ValueError(
            f"{where} has both {filled[0]} and {filled[1]}, which differ: remove one, or set data.ignore=[{filled[1]}]"
        )
    return filled[0] if filled else next((name for name in names if name in message), None)


def _role(message: Mapping[str, Any], where: str, reading: Reading) -> tuple[str, str]:
    key = _key_of(message, ROLE_KEYS, where)
    if key is None or is_null(message[key]):
        raise ValueError(f"{where} has no role among its keys {sorted(message)}: name the key in data.fields.role")
    speaker = reading.roles.get(str(message[key]), str(message[key]))
    role = ROLES.get(speaker.lower())
    if role is None and str(message[key]) in reading.roles:
        raise UnknownRole(
            f"data.roles maps {message[key]} of {where}.{key} to {speaker}, which is no role: use one of "
            f"{', '.join(sorted(set(ROLES.values())))}"
        )
    if role is None and speaker.lower() in THOUGHT_SPEAKERS:
        raise UnknownRole(
            f"{where}.{key} is {message[key]!r}: a thought is no turn of its own; give it as `reasoning_content` in the "
            "message of its answer"
        )
    if role is None:
        known = ", ".join(sorted(set(ROLES) | set(reading.roles)))
        raise UnknownRole(
            f"{where}.{key} is {message[key]!r}, an unknown role: map it with data.roles to one of {known}"
        )
    return role, speaker.lower()


def _content(message: Mapping[str, Any], where: str, role: str) -> tuple[str | None, Any]:
    """(key, value) of the content. A refusal of the assistant is its content, as in OpenAI's messages."""
    key = _key_of(message, CONTENT_KEYS, where)
    raw = None if key is None else message[key]
    refusal = message.get("refusal")
    if role == "assistant" and is_filled(refusal):
        if is_filled(raw):
            raise ValueError(f"{where} has both a content and a refusal: remove one, or set data.ignore=[refusal]")
        return "refusal", refusal
    return key, raw


def _result_turn(result: dict[str, Any], before: Sequence[Turn]) -> Turn:
    """The turn of a tool's result, with the tool's name from the call that it answers."""
    identity = result["tool_call_id"]
    calls = [call for turn in before for call in turn.tool_calls or [] if identity and call.get("id") == identity]
    name = calls[-1]["function"]["name"] if calls else None
    extra = {"is_error": True} if "is_error" in result else None
    return Turn("tool", result["content"], name=name, tool_call_id=identity, extra=extra)


def _join_call(turn: Turn, call: Turn, where: str) -> Turn:
    """A turn with the calls of the message after it: calls in a row are parallel calls of one answer."""
    if turn.train != call.train or (turn.reasoning_content and call.reasoning_content):
        raise ValueError(
            f"{where} continues the assistant's turn before it, with another value of `train` or another thought: "
            "give both the same, or put the calls into one message"
        )
    extra = {**(turn.extra or {}), **(call.extra or {})} or None
    thought = turn.reasoning_content or call.reasoning_content
    calls = [*(turn.tool_calls or []), *(call.tool_calls or [])]
    return replace(turn, tool_calls=calls, reasoning_content=thought, extra=extra)


def _pair_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of a question and an answer, if the message has no role but such a pair."""
    if any(name in message for name in (*ROLE_KEYS, *CONTENT_KEYS)):
        return None
    return next((pair for pair in PAIRS if pair[0] in message and pair[1] in message), None)


def _pair_turns(message: Mapping[str, Any], pair: tuple[str, str], where: str) -> list[Turn]:
    """A question and its answer, with the system prompt before them if there is one."""
    if unknown := next((key for key in message if key not in PAIR_KEYS and is_filled(message[key])), None):
        raise ValueError(
            f"{where} has the key {unknown}, which nothing reads: set data.ignore=[{unknown}], or drop the row"
        )
    train = read_train({"train": message.get("output_with_loss")}, where)
    turns = [Turn("system", message["system"])] if is_filled(message.get("system")) else []
    for role, key in zip(("user", "assistant"), pair, strict=True):
        text = message[key]
        if not isinstance(text, str):
            raise ValueError(f"{where}.{key} is {kind_of(text)}, not text: give its text, or drop the row")
        if not text.strip() and not (role == "assistant" and train is False):
            raise EmptyText(f"{where}.{key} is empty: drop the row")
        turns.append(Turn(role, text, train=train if role == "assistant" else None))
    return turns


def _text_key(message: Mapping[str, Any], key: str, where: str) -> str | None:
    value = message.get(key)
    if isinstance(value, str) or is_null(value):
        return value if isinstance(value, str) else None
    if (number := number_text(value)) is None:
        raise ValueError(f"{where}.{key} is {short(value)}, not text: give a text, or set data.ignore=[{key}]")
    return number


def _extra(message: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Further keys of a message. Raises ValueError for pictures and sound."""
    extra = {key: value for key, value in message.items() if key not in KEYS and not is_null(value)}
    if name := media_column(extra):
        raise ValueError(
            f"{where}.{name} is not text, and only text is supported: drop the row, or set data.ignore=[{name}]"
        )
    return extra or None
