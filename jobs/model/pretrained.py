"""Base weights from `model.source`: by slices where they are stored as they are used, else whole, a rank of a node at a time."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.distributed.collectives import everywhere, first
from jobs.distributed.process_group import World
from jobs.model import embedding_resize
from jobs.model.quantized_linear import Quantised
from jobs.tensor_io import slices
from jobs.tensor_io.layout import Stored
from jobs.tensor_io.model_files import find
from jobs.tensor_io.slices import Part

log = logging.getLogger(__name__)

SHOWN = 20
"""Problems that are listed one by one."""


class Plan(NamedTuple):
    """How the weights come in, the same on all ranks."""

    stored: dict[str, Stored]
    whole: str = ""
    """Why slices cannot be read, where they cannot."""


def load(
    base: PreTrainedModel,
    held: Mapping[str, Part],
    config: Config,
    world: World | None,
    packed: Mapping[str, Quantised],
) -> int:
    """Fill the parts; returns the bytes read from files. `base` is the model without weights and adapters; of what `packed`
    names, a part is quantised as soon as it is read, one weight after another.

    Raises ConfigError, on all ranks, with every tensor that is missing, has no place or another shape.
    """
    folder = _folder(config, world)
    plan = first(lambda: _plan(base, folder, config))
    main = world is not None and world.is_main
    if plan.whole:
        if main:
            log.info(f"weights   whole, on one rank of each node after another: {plan.whole}")
        return _whole(base, held, config, world, packed)
    assert folder is not None
    if main:
        count = len({extent.path for place in plan.stored.values() for extent in place.extents})
        log.info(f"weights   {folder}: {count} safetensors files, each rank reads what it holds")
    names = _names(base)
    places = {key: next(plan.stored[name] for name in names[key] if name in plan.stored) for key in held}

    def filled() -> int:
        left = embedding_resize.fill(
            base, held, places, lambda place, part: _read(folder, [(place, part)], config, False)
        )
        done = _read(folder, [(places[key], part) for key, part in left.items() if key not in packed], config, main)
        for key, layer in packed.items():
            place = places[key]
            done += layer.take(left[key], lambda part, place=place: _read(folder, [(place, part)], config, False))
        return done

    return everywhere(filled)


def _folder(config: Config, world: World | None) -> Path | None:
    """Where the safetensors files are; the first rank of each node downloads what is not there, the others then find it."""
    source, revision = config.model.source, config.model.revision

    def found(cached: bool) -> Path | None:
        try:
            return find(source, revision, cached=cached)
        except (OSError, ValueError) as error:
            raise ConfigError(Problem("model.source", source, f"cannot be fetched: {error}")) from error

    earlier = everywhere(lambda: found(cached=False) if world is None or world.local_rank == 0 else None)
    return everywhere(lambda: earlier or found(cached=True))


def _plan(base: PreTrainedModel, folder: Path | None, config: Config) -> Plan:
    source = config.model.source
    if getattr(base.config, "quantization_config", None):
        raise ConfigError(Problem("model.source", source, "is stored quantised: name the model it was made from"))
    if folder is None:
        return Plan({}, f"{source} has no safetensors files")
    if getattr(base.config, "transformers_weights", None):
        return Plan({}, f"{source} names its files in config.json (transformers_weights)")
    stored = slices.find_tensors(folder, "model.source", source)
    if converted := _converted(base, stored):
        if getattr(base, "rows_before", None) is not None:
            raise ConfigError(
                Problem("data.special_tokens", len(stored), f"cannot be added where transformers converts {converted}")
            )
        return Plan({}, f"transformers converts {converted} for {base.config.model_type}")
    names = _names(base)
    shapes = embedding_resize.stored_shapes(base, {key: tuple(value.shape) for key, value in _expected(base).items()})
    stored = {name: place for name, place in stored.items() if not _ignored(base, name)}
    found = slices.mismatches(stored, names, shapes) or _untied(folder, stored, names)
    if found:
        raise ConfigError(*_problems(source, found))
    return Plan(stored)


def _expected(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What must be stored: parameters, tied ones once, and the buffers that are saved with a model."""
    state = base.state_dict(keep_vars=True)
    return dict(base.named_parameters()) | {
        name: value for name, value in state.items() if not isinstance(value, torch.nn.Parameter)
    }


def _names(base: PreTrainedModel) -> dict[str, list[str]]:
    """Name -> the names under which it may be stored: those tied to it, and all of these without the head's prefix."""
    expected = _expected(base)
    key = {id(value): name for name, value in expected.items()}
    names: dict[str, list[str]] = {name: [] for name in expected}
    for name, value in base.state_dict(keep_vars=True).items():
        names[key[id(value)]] += [name, name.removeprefix(f"{base.base_model_prefix}.")]
    return {name: list(dict.fromkeys(others)) for name, others in names.items()}


def _converted(base: PreTrainedModel, stored: Mapping[str, Stored]) -> str:
    """The first stored tensor that transformers would rename, fuse or turn on its way in; empty where there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for transform in get_model_conversion_mapping(base, add_legacy=False):
        for name in stored:
            renamed, pattern = transform.rename_source_key(name)
            if renamed != name or (pattern is not None and hasattr(transform, "operations")):
                return name
    return ""


def _ignored(base: PreTrainedModel, name: str) -> bool:
    """Stored by older versions of transformers, or for purposes other than this model's: what transformers leaves out too."""
    patterns = [*(base._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    return any(re.search(pattern, name) for pattern in patterns)


def _untied(folder: Path, stored: Mapping[str, Stored], names: Mapping[str, list[str]]) -> list[str]:
    """Tensors that config.json ties, stored twice with different values: training would drop one without a word."""
    found = []
    for others in names.values():
        for one, other in pairwise(name for name in others if name in stored):
            if not slices.probably_equal(folder, stored[one], stored[other]):
                found.append(f"{one} and {other} differ in the files, yet config.json ties them (tie_word_embeddings)")
    return found


def _read(folder: Path, wanted: list[tuple[Stored, Part]], config: Config, show: bool) -> int:
    try:
        return slices.read(folder, wanted, show)
    except OSError as error:
        raise ConfigError(Problem("model.source", config.model.source, f"{folder}: {error}; fetch it again")) from error


def _whole(
    base: PreTrainedModel,
    held: Mapping[str, Part],
    config: Config,
    world: World | None,
    packed: Mapping[str, Quantised],
) -> int:
    """One model at a time in a node's memory."""
    for turn in range(world.local_size if world else 1):
        mine = world is None or world.local_rank == turn
        everywhere(partial(_copy, base, held, config, packed) if mine else lambda: None)
    return 0


def _copy(base: PreTrainedModel, held: Mapping[str, Part], config: Config, packed: Mapping[str, Quantised]) -> None:
    source = config.model.source
    try:
        whole, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.model.revision or "main",
            trust_remote_code=config.model.trust_remote_code,
            dtype=base.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(Problem("model.source", source, f"cannot be loaded: {error}")) from error
    state = whole.state_dict()
    found = [f"{name} is in none of the files" for name in sorted(info["missing_keys"]) if name in held]
    found += [f"{name} has no place in the model" for name in sorted(info["unexpected_keys"])]
    if found:
        raise ConfigError(*_problems(source, found))

    def copy(part: Part, weight: torch.Tensor) -> int:
        part.into.copy_(weight.reshape(-1)[part.begin : part.begin + part.into.numel()])
        return 0

    with torch.no_grad():
        for name, part in held.items():
            if name in packed:
                packed[name].take(part, partial(copy, weight=state[name]))
            else:
                copy(part, state[name])


def _problems(source: str, found: list[str]) -> list[Problem]:
    more = [f"{len(found) - SHOWN} more tensors do not fit"] if len(found) > SHOWN else []
    remedy = "fetch the model again, or take the config.json that belongs to these files"
    return [Problem("model.source", source, f"{text}: {remedy}") for text in found[:SHOWN] + more]
