"""Loads the tokenizer that the config names, with its pad token, added tokens and chat template."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.errors import DataError, Problem, first_line
from conf.schema import Config, Data
from jobs.tokenization.chat_template import template_source


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, else of `model.source`. Raises DataError if it cannot be loaded or set up."""
    source = config.model.tokenizer or config.model.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision(config), trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise DataError(Problem("model.tokenizer", source, f"cannot be loaded: {first_line(error)}")) from error
    _add_tokens(tokenizer, config.data)
    if config.data.chat_template:
        try:
            tokenizer.chat_template = template_source(config.data.chat_template, tokenizer)
        except ValueError as error:
            raise DataError(Problem("data.chat_template", config.data.chat_template, str(error))) from error
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Add `data.special_tokens`, and set the end-of-text and padding tokens.

    Raises DataError if `data.eos_token` or `data.pad_token` is not in the vocabulary.
    """
    if data.special_tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(data.special_tokens)}, replace_extra_special_tokens=False
        )
    vocabulary, problems = tokenizer.get_vocab(), []
    for name in ("eos_token", "pad_token"):
        token = getattr(data, name)
        if token is not None and token not in vocabulary:
            problems.append(
                Problem(f"data.{name}", token, "is not a token of the tokenizer: add it to data.special_tokens too")
            )
        elif token is not None:
            setattr(tokenizer, name, token)
    if problems:
        raise DataError(*problems)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens: bos, eos, pad and so on, and added tokens that are marked as special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def revision(config: Config) -> str:
    """The revision of the model on the Hugging Face Hub."""
    return config.model.revision or "main"
