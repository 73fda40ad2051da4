"""Loads the base weights of `model.source`.

Normally each rank reads only its own slices of the safetensors files, also of weights that are stored in parts or quantized.
Where that is impossible (other file formats, or weights that transformers transposes while loading), the ranks of a node load the
whole model one after another.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from conf.errors import ConfigError, Problem
from conf.schema import Config
from conf.stored_quantization import label
from jobs.distributed.collectives import broadcast_from_rank0, raise_on_all_ranks
from jobs.distributed.process_group import World
from jobs.model import embedding_resize, multimodal, stored_quantization, stored_tensors, text_equality
from jobs.model.multimodal import WholeModel
from jobs.model.quantized_linear import QuantizedLinear
from jobs.tensor_io import slices
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.model_files import find_or_download
from jobs.tensor_io.slices import TensorPart
from jobs.tokenization.tokenizer import revision

log = logging.getLogger(__name__)

MAX_LISTED = 20
"""Tensors that an error lists one by one; the others are counted."""


class LoadMethod(NamedTuple):
    """How the weights are loaded; the same on all ranks."""

    stored: dict[str, StoredTensor]
    """The tensors in the files, by name."""
    why_whole: str = ""
    """Why each rank must load the whole model; empty if it can read slices."""
    untouched: str = ""
    """A log line on the tensors of a multimodal model that are not loaded."""


def load(
    base: PreTrainedModel,
    parts: Mapping[str, TensorPart],
    config: Config,
    world: World | None,
    quantized: Mapping[str, QuantizedLinear],
    *,
    again: bool = False,
) -> int:
    """Fill `parts`; returns the number of bytes read from files (0 if the whole model was loaded). `again` logs nothing.

    `base` is the model without weights and adapters. Weights of `quantized` layers are quantized as soon as they are read,
    one after another. Raises ConfigError on all ranks, with every tensor that is missing, unexpected or of another shape.
    """
    folder = _folder(config, world)
    method = broadcast_from_rank0(lambda: _choose_method(base, folder, config))
    is_main = world is not None and world.is_main and not again
    if is_main and method.untouched:
        log.info(method.untouched)
    if method.why_whole:
        if is_main:
            log.info(f"weights   the ranks of each node load the whole model one after another: {method.why_whole}")
        return _load_whole(base, parts, config, world, quantized)
    assert folder is not None
    if is_main:
        count = len({extent.path for tensor in method.stored.values() for extent in tensor.extents})
        log.info(f"weights   {folder}: {count} safetensors files, each rank reads its own slices")
        if (section := stored_quantization.section(base)) is not None:
            dequantized_count = sum(tensor.is_quantized for tensor in method.stored.values())
            log.info(f"weights   {dequantized_count} of them are stored in {label(section)} and dequantized")
    names = _stored_names(base)
    stored = {key: next(method.stored[name] for name in names[key] if name in method.stored) for key in parts}

    def read_part(tensor: StoredTensor, part: TensorPart) -> int:
        return _read(folder, [(tensor, part)], config, show=False)

    def read_all() -> int:
        to_read = embedding_resize.fill_added_rows(base, parts, stored, read_part)
        wanted = [(stored[key], part) for key, part in to_read.items() if key not in quantized]
        read_bytes = _read(folder, wanted, config, show=is_main)
        for key, layer in quantized.items():
            read_bytes += layer.load(to_read[key], partial(read_part, stored[key]))
        return read_bytes

    return raise_on_all_ranks(read_all)


def why_whole(base: PreTrainedModel, config: Config, world: World | None) -> str:
    """Why single weights cannot be read from the files of `model.source`; empty if they can. All ranks call this together."""
    folder = _folder(config, world)
    return broadcast_from_rank0(lambda: _choose_method(base, folder, config)).why_whole


def _folder(config: Config, world: World | None) -> Path | None:
    """The folder of the safetensors files, or None if there are none.

    The first rank of each node downloads files that are missing; the other ranks then find them in the cache.
    """
    source = config.model.source

    def locate(cached: bool) -> Path | None:
        try:
            return find_or_download(source, config.model.revision, cached=cached)
        except (OSError, ValueError) as error:
            raise ConfigError(Problem("model.source", source, f"cannot be downloaded: {error}")) from error

    downloaded = raise_on_all_ranks(lambda: locate(cached=False) if world is None or world.local_rank == 0 else None)
    return raise_on_all_ranks(lambda: downloaded or locate(cached=True))


def _choose_method(base: PreTrainedModel, folder: Path | None, config: Config) -> LoadMethod:
    source, whole = config.model.source, multimodal.whole_of(base)
    if whole is not None:
        _check_multimodal(base, whole, folder, source)
    if folder is None:
        return LoadMethod({}, f"{source} has no safetensors files")
    if getattr(base.config, "transformers_weights", None):
        return LoadMethod({}, f"{source} lists its files in config.json (transformers_weights)")
    shapes = embedding_resize.stored_shapes(base, {key: tuple(value.shape) for key, value in _expected(base).items()})
    found = stored_quantization.find_tensors(folder, stored_quantization.section(base), source)
    stored, untouched = _without_ignored(found, config), ""
    if whole is None:
        stored, why_whole = stored_tensors.joined(base, stored, shapes, source)
    else:
        problems, untouched = multimodal.check_towers(whole, stored, source, _is_ignored)
        if problems:
            raise ConfigError(*_problems(source, problems))
        stored, converted = whole.text_tensors(base.state_dict(), stored)
        why_whole = stored_tensors.conversion(base, converted)
    if why_whole:
        if getattr(base, "rows_before", None) is not None:
            message = f"tokens cannot be added to this model, because {why_whole}: use tokens that the model reserves"
            raise ConfigError(embedding_resize.problem_of_added_tokens(config, message))
        return LoadMethod({}, why_whole, untouched)
    names = _stored_names(base)
    known = {candidate for candidates in names.values() for candidate in candidates}
    stored = {name: tensor for name, tensor in stored.items() if name in known or not _is_ignored(base, name)}
    problems = slices.mismatches(stored, names, shapes) or _differing_ties(folder, stored, names)
    if problems:
        raise ConfigError(*_problems(source, problems))
    return LoadMethod(stored, untouched=untouched)


def _check_multimodal(base: PreTrainedModel, whole: WholeModel, folder: Path | None, source: str) -> None:
    """Raise ConfigError for a multimodal model whose text cannot be trained alone, or whose towers cannot be copied."""
    reason = ""
    if stored_quantization.section(base) is not None:
        reason = "is stored quantized: set model.source to the original model"
    elif folder is None or getattr(whole.config, "transformers_weights", None):
        reason = "has no plain safetensors files, of which a merge copies its towers: save it with save_pretrained"
    if reason:
        raise ConfigError(Problem("model.source", source, f"is a multimodal model that {reason}"))
    text_equality.require(base, whole, source)


def _without_ignored(stored: dict[str, StoredTensor], config: Config) -> dict[str, StoredTensor]:
    """The stored tensors without those that `model.ignore_tensors` names. Raises ConfigError for a pattern that names none."""
    for pattern in config.model.ignore_tensors:
        if not any(_matches(name, [pattern]) for name in stored):
            message = (
                f"matches none of the {len(stored)} tensors of {config.model.source}, such as {min(stored)}: remove it"
            )
            raise ConfigError(Problem("model.ignore_tensors", pattern, message))
    return {name: tensor for name, tensor in stored.items() if not _matches(name, config.model.ignore_tensors)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _expected(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that the files must contain: parameters (tied ones once), and the buffers that are saved with a model."""
    state = base.state_dict(keep_vars=True)
    return dict(base.named_parameters()) | {
        name: value for name, value in state.items() if not isinstance(value, torch.nn.Parameter)
    }


def _stored_names(base: PreTrainedModel) -> dict[str, list[str]]:
    """Name of each expected tensor -> the names that it may have in the files.

    These are its own name, the names of weights tied to it, and all of them without the prefix of the base model
    (`model.`): files saved from the model without its output head lack that prefix.
    """
    expected = _expected(base)
    key = {id(value): name for name, value in expected.items()}
    names: dict[str, list[str]] = {name: [] for name in expected}
    for name, value in base.state_dict(keep_vars=True).items():
        names[key[id(value)]] += [name, name.removeprefix(f"{base.base_model_prefix}.")]
    return {name: list(dict.fromkeys(candidates)) for name, candidates in names.items()}


def _is_ignored(base: PreTrainedModel, name: str) -> bool:
    """Whether transformers skips this stored tensor too: from an older version, or not needed by this model class."""
    patterns = [*(base._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    return _matches(name, patterns)


def _differing_ties(folder: Path, stored: Mapping[str, StoredTensor], names: Mapping[str, list[str]]) -> list[str]:
    """A sentence about each pair of tied tensors that the files store twice with different values.

    Without this check, training would silently use one of the two and drop the other.
    """
    problems = []
    for candidates in names.values():
        for one, other in pairwise(name for name in candidates if name in stored):
            if not slices.probably_equal(folder, stored[one], stored[other]):
                problems.append(
                    f"{one} and {other} differ in the files, but config.json ties them (tie_word_embeddings)"
                )
    return problems


def _read(folder: Path, wanted: list[tuple[StoredTensor, TensorPart]], config: Config, show: bool) -> int:
    try:
        return slices.read(folder, wanted, show)
    except OSError as error:
        message = f"cannot be read in {folder}: {error}; download the model again"
        raise ConfigError(Problem("model.source", config.model.source, message)) from error


def _load_whole(
    base: PreTrainedModel,
    parts: Mapping[str, TensorPart],
    config: Config,
    world: World | None,
    quantized: Mapping[str, QuantizedLinear],
) -> int:
    """Load the whole model on one rank of each node after another, so that a node's memory holds only one copy."""
    for turn in range(world.local_size if world else 1):
        is_my_turn = world is None or world.local_rank == turn
        raise_on_all_ranks(
            partial(_load_with_transformers, base, parts, config, quantized) if is_my_turn else lambda: None
        )
    return 0


def _load_with_transformers(
    base: PreTrainedModel, parts: Mapping[str, TensorPart], config: Config, quantized: Mapping[str, QuantizedLinear]
) -> None:
    source = config.model.source
    try:
        whole_model = multimodal.whole_of(base)
        loaded: Any = stored_quantization.from_pretrained(
            source,
            revision(config),
            base.dtype,
            trust_remote_code=config.model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(Problem("model.source", source, f"cannot be loaded: {error}")) from error
    whole, info = loaded
    state = whole.state_dict()
    if whole_model is not None:
        state = {name: state[whole_model.name(name)] for name in base.state_dict()}
    problems = [f"{name} is in none of the files" for name in sorted(info["missing_keys"]) if name in parts]
    ignored = config.model.ignore_tensors
    unexpected = [name for name in sorted(info["unexpected_keys"]) if not _matches(name, ignored)]
    problems += [f"{name} is in the files but not in the model" for name in unexpected]
    if problems:
        raise ConfigError(*_problems(source, problems))

    def copy(part: TensorPart, weight: torch.Tensor) -> int:
        part.copy_from(weight)
        return 0

    with torch.no_grad():
        for name, part in parts.items():
            if name in quantized:
                quantized[name].load(part, partial(copy, weight=state[name]))
            else:
                copy(part, state[name])


def _problems(source: str, sentences: list[str]) -> list[Problem]:
    more = [f"{len(sentences) - MAX_LISTED} more tensors do not match"] if len(sentences) > MAX_LISTED else []
    remedy = "download the model again, or use the config.json that belongs to these files"
    if any("not in the model" in text for text in sentences):
        remedy += ". To leave out tensors that training does not need, name them in model.ignore_tensors"
    return [Problem("model.source", source, f"{text}: {remedy}") for text in sentences[:MAX_LISTED] + more]
