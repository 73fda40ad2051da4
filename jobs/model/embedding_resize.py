"""Adds rows to a model's embedding for tokens that the config adds to the tokenizer."""

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from conf.choices import AdapterKind
from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.distributed.log_once import log_once
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.slices import TensorPart


def resize_vocabulary(model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, config: Config) -> int | None:
    """Raise `vocab_size` in a model's config to the size of the tokenizer, if it is smaller.

    Returns the previous size, or None if nothing was added.
    Raises ConfigError with an adapter that leaves the embedding frozen, so that the new rows could not be trained.
    """
    rows_before = model_config.get_text_config().vocab_size
    if len(tokenizer) <= rows_before:
        return None
    adapter = config.adapter
    if adapter.kind is not AdapterKind.none and not adapter.modules_to_save:
        message = (
            f"the tokenizer has {len(tokenizer)} tokens, but the embedding only {rows_before} rows, and an "
            "adapter does not train the embedding. Set adapter.modules_to_save=[embed_tokens,lm_head], or use tokens that the "
            "model reserves"
        )
        raise ConfigError(problem_of_added_tokens(config, message))
    model_config.get_text_config().vocab_size = len(tokenizer)
    log_once(f"embedding grows from {rows_before} to {len(tokenizer)} rows, one for each token of the tokenizer")
    return int(rows_before)


def problem_of_added_tokens(config: Config, message: str) -> Problem:
    """The problem under the key that adds the tokens: `data.special_tokens`, or the tokenizer, if that has them itself."""
    if config.data.special_tokens:
        return Problem("data.special_tokens", f"[{','.join(config.data.special_tokens)}]", message)
    key = "model.tokenizer" if config.model.tokenizer else "model.source"
    return Problem(key, config.model.tokenizer or config.model.source, message)


def stored_shapes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that the weight files must have: those of the model, without added rows."""
    rows_before: int | None = getattr(model, "rows_before", None)
    if rows_before is None:
        return dict(shapes)
    resized = _resized_weights(model)
    return {name: (rows_before, *shape[1:]) if name in resized else shape for name, shape in shapes.items()}


def fill_added_rows(
    model: PreTrainedModel,
    parts: Mapping[str, TensorPart],
    stored: Mapping[str, StoredTensor],
    read: Callable[[StoredTensor, TensorPart], object],
) -> dict[str, TensorPart]:
    """Set each added row to the mean of the stored rows. Returns the parts that must still be read from the files.

    With the mean, a new token is at first as likely as an average token (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models").
    """
    if getattr(model, "rows_before", None) is None:
        return dict(parts)
    to_read = dict(parts)
    for name in _resized_weights(model) & parts.keys():
        part, source = parts[name], stored[name]
        rows, width = source.shape
        in_file = max(0, min(part.destination.numel(), rows * width - part.begin))
        to_read[name] = TensorPart(source.shape, part.begin, part.destination[:in_file], part.trained)
        added = part.destination[in_file:]
        if added.numel():
            whole = torch.empty(rows * width, dtype=torch.float32)
            read(source, TensorPart(source.shape, 0, whole, part.trained))
            mean = whole.view(rows, width).mean(0)
            # A part is a flat range: it may begin in the middle of an added row, at this column.
            column = (part.begin + in_file) % width
            repeats = -(-(column + added.numel()) // width)
            added.copy_(mean.repeat(repeats)[column : column + added.numel()])
    return to_read


def _resized_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights of embedding and output head; a tied weight appears once."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weights = {id(module.weight) for module in (model.get_input_embeddings(), head) if module is not None}
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}
