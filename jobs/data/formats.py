"""Detects the format of raw rows, and converts one row into a Sample.

The formats are those that LLaMA-Factory, Axolotl, TRL, ms-swift and OpenAI document, so that their users' files load without
changes. Rows of any other schema need `data.fields`. A row that does not fit raises an error; nothing is guessed.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from conf.columns import COLUMNS, FORMAT_COLUMNS, INPUT, INSTRUCTION, KEYS, MESSAGES, OUTPUT
from jobs.data import column_mapping
from jobs.data.chat_columns import make_chat
from jobs.data.content_parts import text_of
from jobs.data.cut_characters import refuse_cut_characters
from jobs.data.format_detection import messages_in, reasons_for_formats
from jobs.data.messages import Reading, parse_turns
from jobs.data.refused_rows import refuse_media_placeholders, refuse_options, refuse_other_kinds, refuse_rivals
from jobs.data.row_values import Names, Row, first_filled, is_filled, is_null, kind_of, parse_list
from jobs.data.thoughts import refuse_thought_column
from jobs.data.token_rows import convert_tokens
from jobs.data.train_marks import refuse_marks_in_columns
from jobs.tokenization.conversation import EmptyText, Sample, Turn

MESSAGE_FORMATS = ("messages", "sharegpt", "prompt_completion")
"""Formats whose rows have messages, so that `data.fields` may name keys of a message."""


NAMES = {
    format: frozenset(name for group in groups for name in group) | (KEYS if format in MESSAGE_FORMATS else frozenset())
    for format, groups in FORMAT_COLUMNS.items()
}
"""What `data.fields` may name for each format: its columns, and the keys of its messages."""


def detect_format(row: Row, fields: Names | None = None, ignore: Collection[str] = ()) -> tuple[str, str]:
    """(format, reason) for rows with the columns and types of this one.

    Raises ValueError if no format fits, or if training on such rows would teach the wrong thing.
    """
    fields = fields or {}
    row = _prepare(row, fields, ignore)
    candidates = [name for name in FORMAT_COLUMNS if _fits(name, fields)]
    if fields and not candidates:
        raise ValueError(
            f"data.fields names columns of different formats ({', '.join(fields)}): name only those of one format"
        )
    for name, reason in reasons_for_formats(row):
        if name in candidates:
            return name, reason
    nulls = [name for name, value in row.items() if is_null(value)]
    where = f" where {', '.join(nulls)} {'are' if len(nulls) > 1 else 'is'} null" if nulls else ""
    if fields:
        raise ValueError(
            f"no format that has {', '.join(fields)} (data.fields) fits a row with the columns {', '.join(row)}{where}: "
            "correct data.fields; if it is meant for other sets, give this one its own with data.sets.NAME.fields"
        )
    if messages := first_filled(row, MESSAGES):
        raise ValueError(f"{messages} is {kind_of(row[messages])}, not a list: give a list of messages with roles")
    if "text" in row and "text" not in nulls:
        raise ValueError(
            f"text is {kind_of(row['text'])}, not a text: write texts into this column, or set data.format"
        )
    raise ValueError(
        f"no known format has the columns {', '.join(row) or '(none)'}{where}: "
        "set data.format, and map its columns to yours with data.fields"
    )


def convert(
    row: Row,
    format: str,
    fields: Names | None = None,
    roles: Names | None = None,
    ignore: Collection[str] = (),
    split_thinking: bool = False,
) -> Sample:
    """The sample of one row. Raises ValueError; the message names the column and the remedy.

    fields: for each column of the format, the row's column, or a Jinja template over the row, for example
        "{{ title }}: {{ body }}"; for each key of a message, the key that the row's messages have.
    roles: further names of speakers, and the role of each. ignore: columns, and keys of messages, to read as if the row did
    not have them. split_thinking: take a thought in tags out of the answers.
    """
    if format not in CONVERTERS:
        raise ValueError(f"format {format!r} is unknown: use one of {', '.join(CONVERTERS)}")
    fields = fields or {}
    if fields and not _fits(format, fields):
        column_mapping.check_names(fields)
        name = next(name for name in fields if not _fits(format, {name: ""}))
        raise ValueError(
            f"data.fields.{name} has no meaning in rows of the format {format}: remove it, or correct data.format"
        )
    row = _prepare(row, fields, ignore)
    sample = CONVERTERS[format](row, Reading(fields, roles or {}, frozenset(ignore), split_thinking))
    refuse_media_placeholders(sample)
    refuse_cut_characters(sample, row)
    return sample


def check_fields(rows: Iterable[Row], fields: Names | None, ignore: Collection[str] = ()) -> None:
    """Raise ValueError if `fields` names a column, or a key of a message, that none of these rows has."""
    if fields:
        kept = [{name: value for name, value in row.items() if name not in ignore} for row in rows]
        column_mapping.check_sources(fields, kept, _all_messages)


def unused_columns(row: Row, format: str, fields: Names | None = None, ignore: Collection[str] = ()) -> list[str]:
    """The columns of a row that nothing reads, in the row's order. Null columns and those to ignore are left out."""
    fields = fields or {}
    mapped = column_mapping.map_columns(row, fields) if fields else row
    groups = FORMAT_COLUMNS[format]
    if format == "prompt_completion":  # a text has neither system prompt nor tools
        texts = all(
            isinstance(mapped.get(name), str) and not messages_in(mapped[name], name)
            for name in ("prompt", "completion")
        )
        groups = groups[:2] if texts else groups
    read = {first_filled(mapped, group) for group in groups}
    sources = {name for key, source in fields.items() if key in COLUMNS for name in column_mapping.sources(row, source)}
    return [
        name
        for name, value in row.items()
        if is_filled(value) and name not in {*read, *sources, *ignore, "parallel_tool_calls"}
    ]


def _fits(format: str, fields: Names) -> bool:
    """Whether every key of `fields` is a column of this format, or a key of its messages."""
    return fields.keys() <= NAMES[format]


def _prepare(row: Row, fields: Names, ignore: Collection[str]) -> Row:
    """The row without the columns to ignore, with its columns renamed, and with null for NaN; refused if it is of another kind."""
    if ignore:
        row = {name: value for name, value in row.items() if name not in ignore}
    if fields:
        row = column_mapping.map_columns(row, fields)
    if float in map(type, row.values()):
        row = {name: None if is_null(value) else value for name, value in row.items()}
    refuse_other_kinds(row)
    return row


def _required(row: Row, names: tuple[str, ...], format: str, reading: Reading) -> str:
    """The first of these columns that is not null. Raises ValueError if there is none."""
    if column := first_filled(row, names):
        return column
    if mapped := next((name for name in names if name in reading.fields), None):
        source = reading.fields[mapped]
        raise ValueError(f"{mapped} is null, because the row has no value in {source}: give its text, or drop the row")
    if null_column := next((name for name in names if name in row), None):
        raise ValueError(f"{null_column} is null: give its text, or drop the row")
    raise ValueError(
        f"{format} needs a column {' or '.join(names)}, and this row has {', '.join(row) or 'none'}: "
        "all rows of a file must have one format; split the file, or map the columns with data.fields"
    )


def _list(row: Row, column: str, content: str) -> list[Any]:
    """The list in this column; empty if the row has none. `content` says in the error what the list must hold."""
    value = parse_list(row.get(column), column)
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"{column} is {repr(value)[:60]}, not a list: give a list of {content}, or drop the row")
    return list(value or [])


def _text_of(row: Row, names: tuple[str, ...], format: str, reading: Reading) -> str:
    column = _required(row, names, format, reading)
    text = text_of(row[column], column, reading.fields)
    if not text or text.isspace():
        raise EmptyText(f"{column} is empty, so there is nothing to train on: drop the row")
    return text


def _alpaca(row: Row, reading: Reading) -> Sample:
    """Instruction and input become one question, joined by a newline as in LLaMA-Factory. Answers of the history train too."""
    instruction, input = first_filled(row, INSTRUCTION), first_filled(row, INPUT)
    refuse_options(row, instruction and reading.fields.get(instruction, instruction))
    for names in (INSTRUCTION, INPUT, OUTPUT):
        refuse_rivals(row, names)
    question = text_of(row[instruction], instruction, reading.fields) if instruction else ""
    if input and (text := text_of(row[input], input, reading.fields)):
        question = f"{question}\n{text}" if question else text
    if not question or question.isspace():
        _required(row, INSTRUCTION, "alpaca", reading)
        raise EmptyText("instruction and input are both empty, so there is no question: drop the row")
    turns = []
    for number, pair in enumerate(_list(row, "history", "pairs of texts")):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise ValueError(f"history[{number}] is not a pair of texts: give [question, answer]")
        if not all(half.strip() for half in pair):
            raise EmptyText(f"history[{number}] has an empty question or answer: drop the pair, or the row")
        turns += [Turn("user", pair[0]), *_answer(pair[1], f"history[{number}]", reading)]
    answer = _text_of(row, OUTPUT, "alpaca", reading)
    refuse_thought_column(row, _required(row, OUTPUT, "alpaca", reading), reading.fields)
    return make_chat(row, [*turns, Turn("user", question), *_answer(answer, "the answer", reading)], reading.fields)


def _answer(answer: str, column: str, reading: Reading) -> list[Turn]:
    if not reading.split_thinking:
        return [Turn("assistant", answer)]
    return parse_turns([{"role": "assistant", "content": answer}], column, Reading(split_thinking=True))


def _messages(row: Row, reading: Reading) -> Sample:
    column = _required(row, MESSAGES, "messages", reading)
    refuse_marks_in_columns(row)
    return make_chat(row, parse_turns(row[column], column, reading), reading.fields)


def _prompt_completion(row: Row, reading: Reading) -> Sample:
    """Only the completion is trained. Two texts are joined as plain text; if either side is a list of messages, it is a chat."""
    prompt_column = _required(row, ("prompt",), "prompt_completion", reading)
    column = _required(row, ("completion", *OUTPUT), "prompt_completion", reading)
    if column in OUTPUT:
        refuse_rivals(row, OUTPUT)
    refuse_thought_column(row, column, reading.fields)
    before, after = messages_in(row[prompt_column], prompt_column), messages_in(row[column], column)
    answer = _text_of(row, (column,), "prompt_completion", reading) if after is None else ""
    if before is not None:
        turns = parse_turns(before, prompt_column, reading._replace(trained=False))
        # answers in the prompt are not trained, unless they are marked with `train`
        turns = [replace(turn, train=bool(turn.train)) if turn.role == "assistant" else turn for turn in turns]
    else:
        question = text_of(row[prompt_column], prompt_column, reading.fields)
        if not question or question.isspace():
            raise EmptyText(
                "prompt is empty, so there is no question: drop the row; to train on texts alone, set data.fields.text="
                f"{reading.fields.get(column, column)}"
            )
        if after is None:
            return Sample(parts=((question, False), (answer, True)))
        turns = [Turn("user", question)]
    return make_chat(
        row,
        turns + (_answer(answer, column, reading) if after is None else parse_turns(after, column, reading)),
        reading.fields,
    )


def _all_messages(row: Row) -> list[Any]:
    """All messages of a row whose columns are mapped, of whatever format."""
    values = [parse_list(row[name], name) for name in (*MESSAGES, "prompt", "completion") if row.get(name) is not None]
    return [message for value in values if isinstance(value, list | tuple) for message in value]


def _segments(row: Row, reading: Reading) -> Sample:
    """Axolotl's input_output format: texts in order; those with a true `label` are trained."""
    parts = _list(row, _required(row, ("segments",), "segments", reading), "objects with `text` and `label`")
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) and "label" in part for part in parts):
        raise ValueError("segments must be a list of objects with `text` and `label`")
    return Sample(parts=tuple((part["text"], bool(part["label"])) for part in parts))


def _text(row: Row, reading: Reading) -> Sample:
    return Sample(parts=((_text_of(row, ("text",), "text", reading), True),))


def _tokenized(row: Row, reading: Reading) -> Sample:
    _required(row, ("input_ids",), "tokenised", reading)
    return convert_tokens(row)


CONVERTERS: dict[str, Callable[[Row, Reading], Sample]] = {
    "alpaca": _alpaca,
    "sharegpt": _messages,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "segments": _segments,
    "text": _text,
    "tokenised": _tokenized,
}
"""The function of each format. sharegpt and messages differ only in the keys of a message, and one function reads both."""
