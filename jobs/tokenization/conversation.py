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
    """Whether the row's content is null. `template_inputs` decides whether the template gets null, no content, or an empty text."""
    is_absent: bool = False
    """Whether the template gets no content at all, as `apply_chat_template` does with null."""
    in_parts: bool = False
    """Whether the template gets the content as a list with one part, which templates of models for images may want."""
    train_detail: tuple[tuple[int, int, bool], ...] = ()
    """(begin, end, whether to train on them) of characters of the content; they win over `train` and the mask."""
    extra: Mapping[str, Any] | None = None
    """Further keys of the message, which a template may read."""

    def message(self) -> dict[str, Any]:
        """The turn as `apply_chat_template` takes it: without the keys that have no value.

        A thought is also there as `thinking`, which gpt-oss templates read. Newer versions of transformers add it themselves.
        """
        message: dict[str, Any] = {"role": self.role}
        if not self.is_absent:
            message["content"] = None if self.is_null else self.content
        if self.in_parts:
            message["content"] = [{"type": "text", "text": self.content}]
        if self.tool_calls is not None:
            message["tool_calls"] = self.tool_calls
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.extra is not None:
            message = {**self.extra, **message}
        return message if self.reasoning_content is None else {"thinking": self.reasoning_content, **message}


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
