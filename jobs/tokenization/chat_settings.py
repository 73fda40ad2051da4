"""The settings of a run that decide how chats are rendered, and which of their tokens are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.schema_model import Data

MASKS = ("assistant", "last", "all")
SPECIAL_TOKENS = frozenset(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
RESERVED = (
    frozenset(
        {
            "add_generation_prompt",
            "chat_template",
            "continue_final_message",
            "conversation",
            "conversations",
            "documents",
            "max_length",
            "messages",
            "padding",
            "return_assistant_tokens_mask",
            "return_dict",
            "return_tensors",
            "tokenize",
            "tokenizer_kwargs",
            "tools",
            "truncation",
        }
    )
    | SPECIAL_TOKENS
)
"""Arguments of `apply_chat_template` itself, and variables that the tokenizer sets: rows and config may not set them."""


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
        raise ValueError(f"{', '.join(sorted(taken))} cannot be set here: the rows and the tokenizer decide it")


DEFAULTS = ChatSettings()
