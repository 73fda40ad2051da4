"""Finds the source of a chat template (the tokenizer's own, a bundled one, or a file) and the tokens that end a turn."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from conf.chat_templates import BUNDLED
from jobs.tokenization.turn_spans import Tokens

TEMPLATES = Path(__file__).parent / "chat_templates"
END_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<eos>", "<|eot|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>"),
    *("<turn|>", "<|tool_response>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
)
"""Tokens that end a turn or a text in the model families known to Muster."""
GLM, GLM_END_TOKENS = "[gMASK]", ("<|user|>", "<|observation|>")
"""Tokenizers that have the first token belong to the GLM family, whose answers end with the token that begins the next turn."""


def template_source(template: str | None, tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """Jinja source of a chat template.

    template: None is the tokenizer's own, else a name of `BUNDLED` or a path. Set the result as `tokenizer.chat_template`, so
    that the saved model is used with the template it was trained with. Raises ValueError if there is no such template, or if
    the tokenizer lacks the tokens of a bundled one.
    """
    if template in BUNDLED:
        return _bundled(template, tokenizer)
    if template is not None:
        return _read(template)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer has no chat template: set data.chat_template to one of {', '.join(BUNDLED)}, or to a file"
        )
    return tokenizer.get_chat_template(None, tools)


@lru_cache
def _bundled(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    missing = [
        token for token in BUNDLED[name] if tokenizer.encode(token, add_special_tokens=False) != [_id(token, tokenizer)]
    ]
    if missing:
        raise ValueError(
            f"chat template {name} needs {', '.join(missing)}, which the tokenizer does not have: "
            "use the template of the model's family, or add the tokens to data.special_tokens"
        )
    return _read(str(TEMPLATES / f"{name}.jinja"))


@lru_cache
def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise ValueError(
            f"chat template {path!r} is not a readable file and not one of {', '.join(BUNDLED)}"
        ) from error


def _id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if isinstance(token_id, int) and token_id != tokenizer.unk_token_id else None


def end_tokens(tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[str] = ()) -> tuple[str, ...]:
    """The tokens of this tokenizer that end a turn or a text: `end_of_turn` if it names any, else the known ones."""
    known = end_of_turn or (*END_TOKENS, *_next_roles(tokenizer))
    return tuple(end for end in {tokenizer.eos_token, *known} if end and _id(end, tokenizer) is not None)


def _next_roles(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return GLM_END_TOKENS if _id(GLM, tokenizer) is not None else ()


def span_tokens(tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[str] = ()) -> Tokens:
    """The tokens of this tokenizer that decide where an assistant turn begins and ends."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values())
    special = {*tokenizer.all_special_tokens, *(token for token in added if token.strip())}
    return Tokens(end_tokens(tokenizer, end_of_turn), special, _next_roles(tokenizer))


def end_token_ids(tokenizer: PreTrainedTokenizerBase, end_of_turn: Sequence[str] = ()) -> frozenset[int]:
    """Ids of the tokens that end a turn or a text."""
    ends = end_tokens(tokenizer, end_of_turn)
    return frozenset(token_id for end in ends if (token_id := _id(end, tokenizer)) is not None)
