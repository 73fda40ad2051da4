"""Reads the thought of an answer: from a key of its message, from a part of its content, or from tags in its text."""

from collections.abc import Mapping
from typing import Any

from conf.columns import THOUGHT_KEYS
from jobs.data.row_values import Names, Row, is_filled, kind_of

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")


def read_thought(message: Mapping[str, Any], role: str, part: str | None, where: str) -> str | None:
    """The thought of a message, from any of its known keys or from a part of its content."""
    filled = {name: message[name] for name in THOUGHT_KEYS if is_filled(message.get(name))}
    if part is not None:
        filled["content"] = part
    for name, value in filled.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{where}.{name} is {kind_of(value)}, not text: give the thought as text, or set data.ignore=[{name}]"
            )
    if len(set(filled.values())) > 1:
        first, second = list(filled)[:2]
        raise ValueError(
            f"{where} has both {first} and {second}, which differ: remove one, or set data.ignore=[{first}]"
        )
    if filled:
        return str(next(iter(filled.values())))
    return "" if role == "assistant" and any(message.get(name) == "" for name in THOUGHT_KEYS) else None


def refuse_thought_column(row: Row, answer: str, fields: Names) -> None:
    """Raise ValueError if a column beside the answer holds a thought, which nothing reads there. answer: the answer's column."""
    for name in THOUGHT_KEYS:
        value = row.get(name)
        if isinstance(value, str) and " " in value.strip():  # one word such as "on" is no thought
            source = fields.get(answer, answer)
            written = source if "{" in source else f"{{{{ {source} }}}}"
            raise ValueError(
                f"the column {name} seems to hold the thought before the answer, and is not read: write it into the answer, "
                f"with data.fields.{answer}='\"<think>{{{{ {name} }}}}</think>{written}\"' data.split_thinking=true, "
                f"or set data.ignore=[{name}]"
            )


def split_thought(text: str, thought: str | None, where: str, *, has_detail: bool) -> tuple[str, str | None]:
    """(the answer, the thought) of a text that begins with a thought in tags."""
    begin = text.lstrip()
    pair = next((pair for pair in THOUGHT_TAGS if begin.startswith(pair[0])), None)
    if pair is None:
        if close := next((end for start, end in THOUGHT_TAGS if end in text and start not in text), None):
            raise ValueError(
                f"{where} has {close} without its begin: write the begin before the thought, or drop the row"
            )
        return text, thought
    inside, end, rest = begin[len(pair[0]) :].partition(pair[1])
    if not end:
        raise ValueError(f"{where} begins with {pair[0]} but has no {pair[1]}: end the thought, or drop the row")
    if has_detail:
        raise ValueError(
            f"{where} has a thought to split, and train_detail: set data.split_thinking=false, or split the row"
        )
    if thought and thought.strip() != inside.strip():
        raise ValueError(f"{where} begins with a thought and the message has another one: remove one of them")
    rest = rest.lstrip()
    if rest.startswith(SOLUTION_TAGS[0]) and rest.rstrip().endswith(SOLUTION_TAGS[1]):
        rest = rest.rstrip().removeprefix(SOLUTION_TAGS[0]).removesuffix(SOLUTION_TAGS[1]).strip()
    return rest, inside.strip()
