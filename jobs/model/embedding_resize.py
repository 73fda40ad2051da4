"""Tokens that a config adds to a tokenizer, and the rows that a model's embedding then lacks."""

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from conf.choices import AdapterKind
from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.tensor_io.layout import Stored
from jobs.tensor_io.slices import Part


def grow(shape: PreTrainedConfig, words: PreTrainedTokenizerBase, config: Config) -> int | None:
    """Make room in a model's shape for all tokens; returns the rows before, None where nothing was added.

    Raises ConfigError under an adapter: the embedding is frozen there, and new rows would stay as they were drawn.
    """
    before = shape.get_text_config().vocab_size
    if len(words) <= before:
        return None
    if config.adapter.kind is not AdapterKind.none:
        raise ConfigError(
            Problem(
                "data.special_tokens",
                len(words),
                f"tokens are more than the {before} rows of the embedding, which an adapter leaves frozen: "
                "use tokens that the model reserves, or adapter=none",
            )
        )
    shape.get_text_config().vocab_size = len(words)
    return int(before)


def stored_shapes(base: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that the files must have: those of the model, but for rows that were added."""
    before = getattr(base, "rows_before", None)
    added = _added(base) if before is not None else set()
    return {name: (before, *shape[1:]) if name in added else shape for name, shape in shapes.items()}


def fill(
    base: PreTrainedModel, held: Mapping[str, Part], places: Mapping[str, Stored], read: Callable[[Stored, Part], None]
) -> dict[str, Part]:
    """Give added rows the mean of those before, and return what is left to be read: rows that the files have.

    The mean makes a new token as likely as an average one at first, and no likelier (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models").
    """
    if getattr(base, "rows_before", None) is None:
        return dict(held)
    left = dict(held)
    for name in _added(base) & held.keys():
        part, place = held[name], places[name]
        rows, width = place.shape
        kept = max(0, min(part.into.numel(), rows * width - part.begin))
        left[name] = Part(place.shape, part.begin, part.into[:kept], part.trained)
        new = part.into[kept:]
        if new.numel():
            whole = torch.empty(rows * width, dtype=torch.float32)
            read(place, Part(place.shape, 0, whole, part.trained))
            mean = whole.view(rows, width).mean(0)
            at = (part.begin + kept) % width
            new.copy_(mean.repeat(-(-(at + new.numel()) // width))[at : at + new.numel()])
    return left


def _added(base: PreTrainedModel) -> set[str]:
    """Names of the embedding and the head, tied ones once."""
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = {id(module.weight) for module in modules if module is not None}
    return {name for name, parameter in base.named_parameters() if id(parameter) in weights}
