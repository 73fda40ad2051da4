"""Reads the prompts to answer: a question, or several turns that end in one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import DataError, Problem

FORM = 'is not of the form {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True)
class Prompt:
    messages: list[dict[str, Any]]
    """The turns so far. The last one is the user's."""
    reference: str | None = None
    """What a good answer says, shown beside the model's."""

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return str(self.messages[-1]["content"])


def read(path: Path, system: str | None) -> list[Prompt]:
    """The prompts of a JSONL file: each row has `prompt`, or `messages` with several turns, and may have `reference`.

    `system` goes before each that has no system turn of its own. Raises DataError naming a line of another form.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages, reference = _parsed(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(Problem("generate.prompts", f"{path}:{number}", FORM)) from error
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        prompts.append(Prompt(messages, reference))
    return prompts


def _parsed(row: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Raises ValueError, KeyError or TypeError for a row of another form."""
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    if not messages or messages[-1]["role"] != "user" or not all(isinstance(item["content"], str) for item in messages):
        raise ValueError("the last turn is not a text of the user")
    return list(messages), row.get("reference")
