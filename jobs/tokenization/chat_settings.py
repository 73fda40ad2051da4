"""The settings of a run that decide how chats are rendered, and which of their tokens are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.schema import Data

MASKS = ("assistant", "last", "all")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"})
"""Variables of chat templates that `template_kwargs` cannot set."""


@dataclass(frozen=True)
class ChatSettings:
    """Each field is the value of the key of `data` with the same name; conf/schema.py explains them."""

    mask: str = "assistant"
    train_on: tuple[str, ...] = ("assistant",)
    train_on_end: str = "turn"
    end_of_turn: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for a mask that does not exist, and for variables that a user cannot set."""
        if self.mask not in MASKS:
            raise ValueError(f"mask {self.mask!r} is unknown: use one of {', '.join(MASKS)}")
        check_variables(self.template_kwargs)

    @classmethod
    def of(cls, data: Data) -> "ChatSettings":
        """The settings of a run."""
        return cls(
            data.mask.name,
            tuple(role.name for role in data.train_on),
            data.train_on_end.name,
            tuple(data.end_of_turn),
            dict(data.template_kwargs),
        )


def check_variables(names: Mapping[str, Any]) -> None:
    """Raises ValueError for a variable that only Muster sets."""
    if taken := RESERVED & names.keys():
        raise ValueError(f"{', '.join(sorted(taken))} cannot be set here: the rows decide it")


DEFAULTS = ChatSettings()
