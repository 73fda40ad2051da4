"""Loads the tokenizer that the config names, with its pad token, added tokens and chat template."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conf.errors import DataError, Problem, first_line
from conf.schema import Config
from conf.schema_model import Data
from jobs.tokenization import chat_settings
from jobs.tokenization.chat_template import template_source
from jobs.tokenization.template_inputs import reads


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.tokenizer`, else of `model.source`. Raises DataError if it cannot be loaded or set up."""
    source = config.model.tokenizer or config.model.source
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=revision(config) if source == config.model.source else "main",
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise DataError(Problem("model.tokenizer", source, why_not_loaded(error))) from error
    _add_tokens(tokenizer, config.data)
    if config.data.chat_template:
        try:
            tokenizer.chat_template = template_source(config.data.chat_template, tokenizer)
        except ValueError as error:
            raise DataError(Problem("data.chat_template", config.data.chat_template, str(error))) from error
    _check_variables(tokenizer, config.data)
    return tokenizer


def why_not_loaded(error: Exception) -> str:
    """What transformers says of files that it cannot load. It explains in many lines that their Python code is not trusted."""
    if "trust_remote_code" in str(error):
        return "comes with Python code of its own. Read that code, then add model.trust_remote_code=true"
    return f"cannot be loaded: {first_line(error)}"


def _check_variables(tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Raises DataError for `data.template_kwargs` that the chat template does not read, or that only the rows decide."""
    sources = tokenizer.chat_template or ""
    source = "".join(sources.values()) if isinstance(sources, dict) else sources
    problems = []
    for name, value in data.template_kwargs.items():
        try:
            chat_settings.check_variables({name: value})
        except ValueError as error:
            problems.append(Problem("data.template_kwargs", f"{name}={value}", str(error)))
            continue
        if not reads(source, name):
            message = "the chat template does not read this variable: remove it, or set data.chat_template"
            problems.append(Problem("data.template_kwargs", f"{name}={value}", message))
    if problems:
        raise DataError(*problems)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Add `data.special_tokens`, and set the end-of-text and padding tokens.

    Raises DataError if `data.eos_token`, `data.pad_token` or a token of `data.end_of_turn` is not in the vocabulary.
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
    for token in data.end_of_turn:
        if tokenizer.encode(token, add_special_tokens=False) != [vocabulary.get(token)]:
            message = "is not one token of the tokenizer: add it to data.special_tokens too"
            problems.append(Problem("data.end_of_turn", token, message))
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
