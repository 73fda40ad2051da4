"""Turns raw rows of every shape our users have into samples: recognises the format, and converts one row.

The formats are those that LLaMA-Factory, Axolotl and TRL document, so that their users' files load as they are;
any other schema is reached with `fields`. What cannot be learnt from a row is said, never guessed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conf.columns import INPUT, INSTRUCTION, MESSAGES, OUTPUT
from jobs.data.column_mapping import Names, Row, mapped
from jobs.tokenization.conversation import Empty, Sample, Turn, content_text, parse_tools, parse_turn

SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")
MEDIA = ("images", "image", "videos", "audios")
PREFERENCE = ("chosen", "rejected", "kto_tag")
HIGHEST = 2**31 - 1
"""Of the token ids that can be stored; which of them the tokenizer has, a gate asks."""


def recognise(row: Row, fields: Names | None = None) -> tuple[str, str]:
    """(format, why) of rows with these columns and values. Raises ValueError where none fits, or learning it would be wrong."""
    row = mapped(row, fields)
    _refuse(row)
    speaks = _first(row, MESSAGES)
    output = _first(row, OUTPUT)
    if _first(row, ("input_ids",)):
        return "tokenised", "it has a column input_ids"
    if speaks and isinstance(row[speaks], list):
        opening = row[speaks][0] if row[speaks] and isinstance(row[speaks][0], Mapping) else {}
        name = "sharegpt" if opening.get("from") is not None or opening.get("value") is not None else "messages"
        return name, f"its column {speaks} is a list of turns with the keys {', '.join(opening) or '(none)'}"
    if _first(row, ("prompt",)) and _first(row, ("completion",)):
        return "prompt_completion", "it has the columns prompt and completion"
    if isinstance(row.get("segments"), list):
        return "segments", "its column segments is a list of texts with labels"
    if output and (asked := _first(row, INSTRUCTION) or _first(row, INPUT)):
        return "alpaca", f"it has the columns {asked} and {output}"
    if isinstance(row.get("text"), str):
        return "text", "it has a column text"
    raise ValueError(
        f"no known format has the columns {', '.join(row) or '(none)'}: name the format and map its columns to yours"
    )


def convert(row: Row, format: str, fields: Names | None = None, roles: Names | None = None) -> Sample:
    """The sample of one row. Raises ValueError with a sentence that names the field and the remedy.

    fields: for each column that the format wants, the column that has it, or a Jinja text over the row such as
    "{{ title }}: {{ body }}"; `role` and `content` name the keys inside a message. roles: further speakers of messages.
    """
    if format not in CONVERT:
        raise ValueError(f"format {format!r} is unknown: use one of {', '.join(CONVERT)}")
    row = mapped(row, fields)
    _refuse(row)
    sample = CONVERT[format](row, fields or {}, roles or {})
    if any(map(_halved, _texts(sample))):
        column = next((name for name, value in row.items() if _halved(_plain(value))), "the row")
        raise ValueError(
            f"{column} holds half a character (a surrogate such as \\ud83d without its other half): "
            "mend the text, which was cut inside an emoji, or drop the row"
        )
    return sample


def _texts(sample: Sample) -> Iterator[str]:
    """All texts that may become tokens."""
    yield from (text for text, _ in sample.parts)
    if sample.tools:
        yield _plain(sample.tools)
    for each in sample.turns:
        yield each.content
        more = (each.tool_calls, each.reasoning_content, each.name, each.tool_call_id)
        yield from (value if isinstance(value, str) else _plain(value) for value in more if value)


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _halved(text: str) -> bool:
    """Whether a character is half of a pair, which UTF-8 cannot write."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _refuse(row: Row) -> None:
    """Rows that would load, and teach the wrong thing."""
    if column := _first(row, PREFERENCE):
        raise ValueError(
            f"the column {column} marks preferences: fine-tuning wants only the good answers; make it such rows"
        )
    if "completion" in row and isinstance(row.get("label"), bool):
        raise ValueError("the column label marks preferences: keep the rows where it is true, and drop the column")
    if column := next((name for name in MEDIA if row.get(name)), None):
        raise ValueError(f"the column {column} is not text: only text is trained on; drop the row, or the column")


def _first(row: Row, names: Sequence[str]) -> str | None:
    """The first of the columns with a value: Arrow files hold null where a row lacks one."""
    for name in names:
        if row.get(name) is not None:
            return name
    return None


def _need(row: Row, names: Sequence[str], format: str) -> str:
    if column := _first(row, names):
        return column
    if there := next((name for name in names if name in row), None):
        raise ValueError(f"{there} is null: give its text, or drop the row")
    raise ValueError(
        f"{format} needs a column {' or '.join(names)}, and this row has {', '.join(row) or 'none'}: "
        "all rows of a file have one format; split the file, or map the columns"
    )


def _list(row: Row, column: str, what: str) -> list[Any]:
    """The column's list, empty where there is none."""
    found = row.get(column)
    if found is not None and not isinstance(found, list | tuple):
        raise ValueError(f"{column} is {_short(found)}, not a list: give a list of {what}, or drop the row")
    return list(found or [])


def _short(value: object) -> str:
    return "null" if value is None else repr(value)[:60]


def _text_of(row: Row, names: Sequence[str], format: str) -> str:
    column = _need(row, names, format)
    text = content_text(row[column], column)
    if not text.strip():
        raise Empty(f"{column} is empty: there is nothing to learn; drop the row")
    return text


def _alpaca(row: Row, fields: Names, roles: Names) -> Sample:
    """Instruction and input are one question, joined by a line end as LLaMA-Factory does; answers of the history are learnt too."""
    asked = [content_text(row[name], name) for name in (_first(row, INSTRUCTION), _first(row, INPUT)) if name]
    question = "\n".join(part for part in asked if part)
    if not question.strip():
        _need(row, INSTRUCTION, "alpaca")
        raise Empty("instruction and input are both empty: there is no question; drop the row")
    turns = []
    for number, pair in enumerate(_list(row, "history", "pairs of texts")):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise ValueError(f"history[{number}] is not a pair of texts: give [question, answer]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    turns += [Turn("user", question), Turn("assistant", _text_of(row, OUTPUT, "alpaca"))]
    return _chat(row, turns)


def _messages(row: Row, fields: Names, roles: Names) -> Sample:
    column = _need(row, MESSAGES, "messages")
    return _chat(row, _turns(row[column], column, fields, roles))


def _turns(raw: object, column: str, fields: Names, roles: Names) -> list[Turn]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{column} is {'empty' if raw == [] else 'not a list'}: give a list of turns with roles")
    return [parse_turn(message, f"{column}[{number}]", fields, roles) for number, message in enumerate(raw)]


def _chat(row: Row, turns: list[Turn]) -> Sample:
    """The turns with the row's system prompt and tools; a system turn of its own wins over the column."""
    if not any(each.role == "assistant" for each in turns):
        raise ValueError("no turn is the assistant's: there is nothing to learn; drop the row, or map its roles")
    system, tools = _first(row, SYSTEM), _first(row, TOOLS)
    if system and row[system] and turns[0].role != "system":
        turns = [Turn("system", content_text(row[system], system)), *turns]
    return Sample(turns=tuple(turns), tools=parse_tools(row[tools]) if tools else None)


def _prompt_completion(row: Row, fields: Names, roles: Names) -> Sample:
    """Only the completion is learnt. Two strings are plain text, joined as they are; turns on either side make a chat."""
    prompt, completion = (row[_need(row, (name,), "prompt_completion")] for name in ("prompt", "completion"))
    if isinstance(completion, str) and not completion.strip():
        raise Empty("completion is empty: there is nothing to learn; drop the row")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Sample(parts=((prompt, False), (completion, True)))
    asked = [Turn("user", prompt)] if isinstance(prompt, str) else _turns(prompt, "prompt", fields, roles)
    asked = [replace(each, train=bool(each.train)) if each.role == "assistant" else each for each in asked]
    if isinstance(completion, str):
        return _chat(row, [*asked, Turn("assistant", completion)])
    return _chat(row, asked + _turns(completion, "completion", fields, roles))


def _segments(row: Row, fields: Names, roles: Names) -> Sample:
    """Axolotl's input_output: texts in order, `label` says which are learnt."""
    parts = _list(row, _need(row, ("segments",), "segments"), "objects with `text` and `label`")
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) and "label" in part for part in parts):
        raise ValueError("segments wants a list of objects with `text` and `label`")
    return Sample(parts=tuple((part["text"], bool(part["label"])) for part in parts))


def _text(row: Row, fields: Names, roles: Names) -> Sample:
    return Sample(parts=((_text_of(row, ("text",), "text"), True),))


def _tokenised(row: Row, fields: Names, roles: Names) -> Sample:
    """Finished tokens; padding (attention_mask 0) is cut off. Without labels every token is learnt."""
    ids = _list(row, _need(row, ("input_ids",), "tokenised"), "token ids")
    strange = next((at for at, token in enumerate(ids) if type(token) is not int or abs(token) > HIGHEST), None)
    if strange is not None:
        raise ValueError(
            f"input_ids[{strange}] is {_short(ids[strange])}, not a token id: give integers, or drop the row"
        )
    labels = ids if row.get("labels") is None else _list(row, "labels", "token ids and -100")
    seen = [1] * len(ids) if row.get("attention_mask") is None else _list(row, "attention_mask", "0 and 1")
    if not len(ids) == len(labels) == len(seen):
        raise ValueError(
            f"input_ids has {len(ids)} tokens, labels {len(labels)}, attention_mask {len(seen)}: make them equal"
        )
    kept = [(token, label) for token, label, real in zip(ids, labels, seen, strict=True) if real]
    if unlike := next((pair for pair in kept if pair[1] not in (-100, pair[0])), None):
        raise ValueError(
            f"a label is {_short(unlike[1])} where the token is {unlike[0]}: labels are the token or -100, not shifted"
        )
    if not kept:
        raise Empty("input_ids is empty: drop the row")
    return Sample(ids=tuple(token for token, _ in kept), labels=tuple(label for _, label in kept))


CONVERT: dict[str, Callable[[Row, Names, Names], Sample]] = {
    "alpaca": _alpaca,
    "sharegpt": _messages,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "segments": _segments,
    "text": _text,
    "tokenised": _tokenised,
}
"""Every format by name; sharegpt and messages differ in their keys only, and either reads both."""
