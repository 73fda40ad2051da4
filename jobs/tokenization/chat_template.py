"""Finds a chat template: the tokenizer's own, one that comes with Muster, or a file; and knows which tokens end a turn."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

TEMPLATES = Path(__file__).parent / "chat_templates"
NAMED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}
"""The templates that come with Muster, and the tokens that a tokenizer must have for each."""

ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<eos>", "<|eot|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>"),
)
"""Tokens that end a turn in the families of models we know."""


def template_text(template: str | None, tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """Jinja source of a template: set it as `tokenizer.chat_template`, so that the saved model speaks as it was taught."""
    if template in NAMED:
        return _named(template, tokenizer)
    if template is not None:
        return _file(template)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer has no chat template: name one of {', '.join(NAMED)}, or a file")
    return tokenizer.get_chat_template(None, tools)


@lru_cache
def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    absent = [
        token for token in NAMED[name] if tokenizer.encode(token, add_special_tokens=False) != [_id(token, tokenizer)]
    ]
    if absent:
        raise ValueError(
            f"template {name} writes {', '.join(absent)}, no token of this tokenizer: "
            "use the template of the model's family, or add the tokens first"
        )
    return _file(str(TEMPLATES / f"{name}.jinja"))


@lru_cache
def _file(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise ValueError(
            f"template {path!r} is neither one of {', '.join(NAMED)} nor a file that can be read"
        ) from error


def _id(token: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(end for end in {tokenizer.eos_token, *ENDS} if end and _id(end, tokenizer) is not None)
