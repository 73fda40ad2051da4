"""Loads the tokenizer that the config names, with its pad token, added tokens and chat template."""

from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from conf.errors import DataError, Problem, first_line
from conf.schema import Config, Data
from jobs.tokenization.chat_template import template_text


def extend(words: PreTrainedTokenizerBase, data: Data) -> None:
    """Add `data.special_tokens`, and set the end-of-text and padding tokens. Raises DataError for one that is no token."""
    if data.special_tokens:
        words.add_special_tokens(
            {"additional_special_tokens": list(data.special_tokens)}, replace_extra_special_tokens=False
        )
    known, problems = words.get_vocab(), []
    for name in ("eos_token", "pad_token"):
        token = getattr(data, name)
        if token is not None and token not in known:
            problems.append(Problem(f"data.{name}", token, "is no token: add it to data.special_tokens too"))
        elif token is not None:
            setattr(words, name, token)
    if problems:
        raise DataError(*problems)
    if words.pad_token_id is None:
        words.pad_token = words.eos_token


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Raises DataError when there is no tokenizer in `model.tokenizer` or `model.source`, or it cannot pad."""
    source = config.model.tokenizer or config.model.source
    try:
        found = AutoTokenizer.from_pretrained(
            source, revision=revision(config), trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(Problem("model.tokenizer", source, f"cannot be loaded: {first_line(error)}")) from error
    extend(found, config.data)
    if config.data.chat_template:
        try:
            found.chat_template = template_text(config.data.chat_template, found)
        except ValueError as error:
            raise DataError(Problem("data.chat_template", config.data.chat_template, str(error))) from error
    return found


def revision(config: Config) -> str:
    return config.model.revision or "main"
