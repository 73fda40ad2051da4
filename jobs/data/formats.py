"""Detects the format of raw rows, and converts one row into a Sample.

The formats are those that LLaMA-Factory, Axolotl and TRL document, so that their users' files load without changes. Rows of
any other schema need `data.fields`. A row that does not fit raises an error; nothing is guessed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conf.columns import INPUT, INSTRUCTION, MESSAGES, OUTPUT
from jobs.data.column_mapping import Names, Row, map_columns
from jobs.tokenization.conversation import EmptyText, Sample, Turn, content_text, parse_tools, parse_turn

SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
MEDIA = ("images", "image", "videos", "audios")
PREFERENCE = ("chosen", "rejected", "kto_tag")
MAX_TOKEN_ID = 2**31 - 1
"""Highest token id that an int32 can store. The gate `vocabulary` checks ids against the tokenizer."""


def detect_format(row: Row, fields: Names | None = None) -> tuple[str, str]:
    """(format, reason) for rows with the columns and types of this one.

    Raises ValueError if no format fits, or if training on such rows would teach the wrong thing.
    """
    row = map_columns(row, fields)
    _refuse_unsupported(row)
    messages = _first_filled(row, MESSAGES)
    output = _first_filled(row, OUTPUT)
    if _first_filled(row, ("input_ids",)):
        return "tokenised", "it has a column input_ids"
    if messages and isinstance(row[messages], list):
        opening = row[messages][0] if row[messages] and isinstance(row[messages][0], Mapping) else {}
        name = "sharegpt" if opening.get("from") is not None or opening.get("value") is not None else "messages"
        return name, f"its column {messages} is a list of turns with the keys {', '.join(opening) or '(none)'}"
    if _first_filled(row, ("prompt",)) and _first_filled(row, ("completion",)):
        return "prompt_completion", "it has the columns prompt and completion"
    if isinstance(row.get("segments"), list):
        return "segments", "its column segments is a list of texts with labels"
    if output and (question := _first_filled(row, INSTRUCTION) or _first_filled(row, INPUT)):
        return "alpaca", f"it has the columns {question} and {output}"
    if isinstance(row.get("text"), str):
        return "text", "it has a column text"
    raise ValueError(
        f"no known format has the columns {', '.join(row) or '(none)'}: "
        "set data.format, and map its columns to yours with data.fields"
    )


def convert(row: Row, format: str, fields: Names | None = None, roles: Names | None = None) -> Sample:
    """The sample of one row. Raises ValueError; the message names the column and the remedy.

    fields: for each column of the format, the row's column, or a Jinja template over the row, for example
        "{{ title }}: {{ body }}". `role` and `content` name the keys inside a message.
    roles: further names of speakers, and the role of each.
    """
    if format not in CONVERTERS:
        raise ValueError(f"format {format!r} is unknown: use one of {', '.join(CONVERTERS)}")
    row = map_columns(row, fields)
    _refuse_unsupported(row)
    sample = CONVERTERS[format](row, fields or {}, roles or {})
    if any(map(_has_lone_surrogate, _texts(sample))):
        column = next((name for name, value in row.items() if _has_lone_surrogate(_to_json(value))), "the row")
        raise ValueError(
            f"{column} holds half a character (a surrogate such as \\ud83d without its other half): "
            "an emoji was cut in two; repair the text, or drop the row"
        )
    return sample


def _texts(sample: Sample) -> Iterator[str]:
    """All texts of a sample that may become tokens."""
    yield from (text for text, _ in sample.parts)
    if sample.tools:
        yield _to_json(sample.tools)
    for turn in sample.turns:
        yield turn.content
        other_fields = (turn.tool_calls, turn.reasoning_content, turn.name, turn.tool_call_id)
        yield from (value if isinstance(value, str) else _to_json(value) for value in other_fields if value)


def _to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _has_lone_surrogate(text: str) -> bool:
    """Whether the text has one half of a surrogate pair alone, which UTF-8 cannot encode."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _refuse_unsupported(row: Row) -> None:
    """Raise ValueError for rows that would load without an error, but teach the wrong thing."""
    if column := _first_filled(row, PREFERENCE):
        raise ValueError(
            f"the column {column} marks preference data, which is not supported: keep only the good answers, "
            "as rows of another format"
        )
    if "completion" in row and isinstance(row.get("label"), bool):
        raise ValueError(
            "the column label marks preference data, which is not supported: keep the rows where it is true, "
            "and drop the column"
        )
    if column := next((name for name in MEDIA if row.get(name)), None):
        raise ValueError(f"the column {column} is not text, and only text is supported: drop the row or the column")


def _first_filled(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that is not null: Arrow files store null in a row that lacks the column."""
    for name in names:
        if row.get(name) is not None:
            return name
    return None


def _required(row: Row, names: Sequence[str], format: str) -> str:
    """The first of these columns that is not null. Raises ValueError if there is none."""
    if column := _first_filled(row, names):
        return column
    if null_column := next((name for name in names if name in row), None):
        raise ValueError(f"{null_column} is null: give its text, or drop the row")
    raise ValueError(
        f"{format} needs a column {' or '.join(names)}, and this row has {', '.join(row) or 'none'}: "
        "all rows of a file must have one format; split the file, or map the columns with data.fields"
    )


def _list(row: Row, column: str, content: str) -> list[Any]:
    """The list in this column; empty if the row has none. `content` says in the error what the list must hold."""
    value = row.get(column)
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"{column} is {_short(value)}, not a list: give a list of {content}, or drop the row")
    return list(value or [])


def _short(value: object) -> str:
    return "null" if value is None else repr(value)[:60]


def _text_of(row: Row, names: Sequence[str], format: str) -> str:
    column = _required(row, names, format)
    text = content_text(row[column], column)
    if not text.strip():
        raise EmptyText(f"{column} is empty, so there is nothing to train on: drop the row")
    return text


def _alpaca(row: Row, fields: Names, roles: Names) -> Sample:
    """Instruction and input become one question, joined by a newline as in LLaMA-Factory. Answers of the history train too."""
    columns = (_first_filled(row, INSTRUCTION), _first_filled(row, INPUT))
    question = "\n".join(text for name in columns if name and (text := content_text(row[name], name)))
    if not question.strip():
        _required(row, INSTRUCTION, "alpaca")
        raise EmptyText("instruction and input are both empty, so there is no question: drop the row")
    turns = []
    for number, pair in enumerate(_list(row, "history", "pairs of texts")):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise ValueError(f"history[{number}] is not a pair of texts: give [question, answer]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    turns += [Turn("user", question), Turn("assistant", _text_of(row, OUTPUT, "alpaca"))]
    return _chat(row, turns)


def _messages(row: Row, fields: Names, roles: Names) -> Sample:
    column = _required(row, MESSAGES, "messages")
    return _chat(row, _turns(row[column], column, fields, roles))


def _turns(raw: object, column: str, fields: Names, roles: Names) -> list[Turn]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{column} is {'empty' if raw == [] else 'not a list'}: give a list of messages with roles")
    return [parse_turn(message, f"{column}[{number}]", fields, roles) for number, message in enumerate(raw)]


def _chat(row: Row, turns: list[Turn]) -> Sample:
    """A chat of these turns, with the row's system prompt and tools. A system turn in the chat wins over the system column."""
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError(
            "no turn is the assistant's, so there is nothing to train on: drop the row, or map its roles with data.roles"
        )
    system, tools = _first_filled(row, SYSTEM), _first_filled(row, TOOLS)
    if system and row[system] and turns[0].role != "system":
        turns = [Turn("system", content_text(row[system], system)), *turns]
    return Sample(turns=tuple(turns), tools=parse_tools(row[tools]) if tools else None)


def _prompt_completion(row: Row, fields: Names, roles: Names) -> Sample:
    """Only the completion is trained. Two strings are joined as plain text; if either side is a list of messages, it is a chat."""
    prompt, completion = (row[_required(row, (name,), "prompt_completion")] for name in ("prompt", "completion"))
    if isinstance(completion, str) and not completion.strip():
        raise EmptyText("completion is empty, so there is nothing to train on: drop the row")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Sample(parts=((prompt, False), (completion, True)))
    turns = [Turn("user", prompt)] if isinstance(prompt, str) else _turns(prompt, "prompt", fields, roles)
    # answers in the prompt are not trained, unless they are marked with `train`
    turns = [replace(turn, train=bool(turn.train)) if turn.role == "assistant" else turn for turn in turns]
    if isinstance(completion, str):
        return _chat(row, [*turns, Turn("assistant", completion)])
    return _chat(row, turns + _turns(completion, "completion", fields, roles))


def _segments(row: Row, fields: Names, roles: Names) -> Sample:
    """Axolotl's input_output format: texts in order; those with a true `label` are trained."""
    parts = _list(row, _required(row, ("segments",), "segments"), "objects with `text` and `label`")
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) and "label" in part for part in parts):
        raise ValueError("segments must be a list of objects with `text` and `label`")
    return Sample(parts=tuple((part["text"], bool(part["label"])) for part in parts))


def _text(row: Row, fields: Names, roles: Names) -> Sample:
    return Sample(parts=((_text_of(row, ("text",), "text"), True),))


def _tokenized(row: Row, fields: Names, roles: Names) -> Sample:
    """Rows that are tokens already. Padding (attention_mask 0) is removed. Without labels, every token is trained."""
    ids = _list(row, _required(row, ("input_ids",), "tokenised"), "token ids")
    bad = next((index for index, token in enumerate(ids) if type(token) is not int or abs(token) > MAX_TOKEN_ID), None)
    if bad is not None:
        raise ValueError(f"input_ids[{bad}] is {_short(ids[bad])}, not a token id: give integers, or drop the row")
    labels = ids if row.get("labels") is None else _list(row, "labels", "token ids and -100")
    mask = [1] * len(ids) if row.get("attention_mask") is None else _list(row, "attention_mask", "0 and 1")
    if not len(ids) == len(labels) == len(mask):
        raise ValueError(
            f"input_ids has {len(ids)} tokens, labels {len(labels)}, attention_mask {len(mask)}: "
            "all must have the same length"
        )
    kept = [(token, label) for token, label, is_token in zip(ids, labels, mask, strict=True) if is_token]
    if mismatch := next((pair for pair in kept if pair[1] not in (-100, pair[0])), None):
        raise ValueError(
            f"a label is {_short(mismatch[1])} where the token is {mismatch[0]}: "
            "a label must be the token itself or -100; do not shift the labels"
        )
    if not kept:
        raise EmptyText("input_ids is empty: drop the row")
    return Sample(ids=tuple(token for token, _ in kept), labels=tuple(label for _, label in kept))


CONVERTERS: dict[str, Callable[[Row, Names, Names], Sample]] = {
    "alpaca": _alpaca,
    "sharegpt": _messages,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "segments": _segments,
    "text": _text,
    "tokenised": _tokenized,
}
"""The function of each format. sharegpt and messages differ only in the keys of a message, and one function reads both."""
