"""Makes a chat of turns and of the columns beside them: system prompt, tools, documents, variables of the chat template."""

from collections.abc import Mapping
from typing import Any

from conf.columns import DOCUMENTS, SYSTEM, TOOLS
from jobs.data.content_parts import text_of
from jobs.data.row_values import Names, Row, first_filled, is_null, kind_of, parse_json, parse_list
from jobs.data.tool_calls import parse_tools
from jobs.tokenization.chat_settings import RESERVED
from jobs.tokenization.conversation import Sample, Turn


def make_chat(row: Row, turns: list[Turn], fields: Names) -> Sample:
    """A chat of these turns, with the row's system prompt, tools, documents and template variables.

    Raises ValueError if the chat has another system prompt than the system column.
    """
    for turn in turns:
        if turn.role == "assistant":
            break
    else:
        raise ValueError(
            "no turn is the assistant's, so there is nothing to train on: drop the row, or map its roles with data.roles"
        )
    system, tools = first_filled(row, SYSTEM), first_filled(row, TOOLS)
    if system and row[system]:
        prompt = text_of(row[system], system, fields)
        if turns[0].role != "system":
            turns = [Turn("system", prompt), *turns]
        elif prompt.strip() != turns[0].content.strip():
            raise ValueError(
                f"the column {system} and the first message are two different system prompts: "
                f"drop one of them, or set data.ignore=[{system}] to keep that of the message"
            )
    parsed_tools = parse_tools(row[tools]) if tools else None
    documents = first_filled(row, DOCUMENTS)
    if documents or row.get("chat_template_kwargs"):
        parsed_documents = _documents(row[documents], documents) if documents else None
        return Sample(tuple(turns), parsed_tools, documents=parsed_documents, template_kwargs=_template_kwargs(row))
    return Sample(turns=tuple(turns), tools=parsed_tools)


def _documents(raw: Any, column: str) -> list[dict[str, Any]] | None:
    """Documents as objects; a text becomes {text: ...}."""
    raw = parse_list(raw, column)
    documents = []
    for number, document in enumerate(raw if isinstance(raw, list | tuple) else [raw] if raw else []):
        if not isinstance(document, str | Mapping):
            raise ValueError(
                f"{column}[{number}] is {kind_of(document)}, not a text or an object: "
                f"give {{title, text}}, or set data.ignore=[{column}]"
            )
        documents.append({"text": document} if isinstance(document, str) else _without_nulls(document))
    return documents or None


def _template_kwargs(row: Row) -> dict[str, Any] | None:
    """The row's own variables for the chat template, without nulls, which Arrow fills in."""
    raw = row.get("chat_template_kwargs")
    if isinstance(raw, str) and raw.strip():
        raw = parse_json(raw, "chat_template_kwargs")
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"chat_template_kwargs is {kind_of(raw)}, not an object: give {{name: value}}, or drop the column"
        )
    if reserved := sorted(RESERVED & raw.keys()):
        raise ValueError(
            f"chat_template_kwargs sets {reserved[0]}, which the row's columns or the tokenizer decide: remove it"
        )
    return _without_nulls(raw) or None


def _without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not is_null(item)}
