"""The common form of a row, whatever its format: turns of a chat with tools, parts of plain text, or token ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class UnknownRole(ValueError):
    """The speaker of a turn is neither a known name nor among the roles given by the config."""


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
    """Whether the row's content is null. Templates that test for null get null, others an empty text."""
    train_detail: tuple[tuple[int, int, bool], ...] = ()
    """(begin, end, whether to train on them) of characters of the content; they win over `train` and the mask."""
    extra: Mapping[str, Any] | None = None
    """Further keys of the message, which a template may read."""

    def message(self) -> dict[str, Any]:
        """The turn as `apply_chat_template` takes it: without the keys that have no value."""
        message = {
            "role": self.role,
            "content": self.content,
            "tool_calls": self.tool_calls,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        return {**(self.extra or {}), **{key: value for key, value in message.items() if value is not None}}


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
    lengths: tuple[int, ...] = ()
    """Tokens of each of several samples that `ids` holds one after the other. Empty: one sample."""
    documents: list[dict[str, Any]] | None = None
    """Documents that the chat template writes before the turns."""
    template_kwargs: Mapping[str, Any] | None = None
    """The row's own variables for the chat template. They win over `data.template_kwargs`."""
