"""Refuses numbers of `model.architecture` that no model can have, and settings that its shape rules out; pure."""

from collections.abc import Iterator

from conf.choices import AdapterKind, Init
from conf.errors import Problem
from conf.families import FIXED_POSITIONS
from conf.schema import Config
from conf.schema_model import Architecture
from launcher.check.model_files import Families, ModelFiles
from launcher.estimate.config_json import positions, positions_of
from launcher.estimate.family_defaults import DEFAULTS

KEY = "model.architecture"


def problems(
    config: Config, files: ModelFiles | None, families: Families | None, tokens: int | None
) -> Iterator[Problem]:
    """What cannot be built, or not be trained as asked. `tokens` is the size of the tokenizer, if it is known."""
    shape = config.model.architecture
    if "train" not in config.jobs:
        return
    yield from _positions(config, files)
    if shape is None:
        return
    yield from _heads(shape)
    if config.adapter.kind is not AdapterKind.none and config.adapter.r > shape.hidden_size:
        message = f"is more than the layers have: their rank is at most {KEY}.hidden_size={shape.hidden_size}. Use adapter.r=64"
        yield Problem("adapter.r", config.adapter.r, message)
    if config.model.init is not Init.random:
        return
    known = families.text if families else frozenset(DEFAULTS)
    if shape.model_type not in known:
        message = (
            "is no family that can be built as a model of text. Use the model_type of a config.json, for example llama"
        )
        yield Problem(f"{KEY}.model_type", shape.model_type, message)
    if tokens is not None and shape.vocab_size < tokens:
        message = f"the tokenizer {config.model.tokenizer or config.model.source} has {tokens} tokens. Set it to at least {tokens}"
        yield Problem(f"{KEY}.vocab_size", shape.vocab_size, message)


def _heads(shape: Architecture) -> Iterator[Problem]:
    hidden, heads, shared = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads
    if min(hidden, heads, shared) < 1:
        return
    if "head_dim" not in shape.extra and hidden % heads:
        message = f"must divide {KEY}.hidden_size={hidden}, unless {KEY}.extra.head_dim is set. Use {_divisor_near(hidden, heads)}"
        yield Problem(f"{KEY}.num_attention_heads", heads, message)
    elif heads % shared:
        message = f"must divide {KEY}.num_attention_heads={heads}. Use {_divisor_near(heads, shared)}"
        yield Problem(f"{KEY}.num_key_value_heads", shared, message)
    elif "head_dim" not in shape.extra and hidden // heads % 2 and shape.model_type not in FIXED_POSITIONS:
        message = f"makes heads of {hidden // heads} numbers, but rotary positions turn pairs of them. Use another divisor of "
        yield Problem(f"{KEY}.num_attention_heads", heads, f"{message}{KEY}.hidden_size={hidden}, or an even head_dim")


def _divisor_near(number: int, wanted: int) -> int:
    """The largest divisor of `number` that is at most `wanted`."""
    return next(size for size in range(min(wanted, number), 0, -1) if number % size == 0)


def _positions(config: Config, files: ModelFiles | None) -> Iterator[Problem]:
    """Rows longer than the model was made for. A packed row holds several samples, and each has positions of its own."""
    shape, length = config.model.architecture, config.data.max_length
    if files is not None and files.fields is not None:
        family, longest = files.fields.get("model_type"), positions(files.fields)
    elif shape is not None:
        family, longest = shape.model_type, positions_of(shape)
    else:
        return
    fixed = family in FIXED_POSITIONS
    may_be_longer = config.data.packing or config.model.init is Init.random  # without weights, no position was learned
    if longest is None or length <= longest or (may_be_longer and not fixed):
        return
    message = f"is more than the {longest} positions of the model (max_position_embeddings, with rope scaling). "
    message += f"Use data.max_length={longest}"
    if not fixed:
        message += ", or change these in its config.json to train it for longer rows"
    yield Problem("data.max_length", length, message)
