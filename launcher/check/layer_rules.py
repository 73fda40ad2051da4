"""Refuses names of layers and weights that the model does not have; pure."""

import difflib
import re
from collections.abc import Iterator

from conf.choices import AdapterKind, Backend
from conf.errors import Problem
from conf.families import EXPERTS_ONE_BY_ONE, NO_DORA, NO_DROPOUT, NOT_UNDER_ZERO_3, TENSOR_STYLES
from conf.schema import Config
from launcher.check.layer_names import LayerNames

ALL = "all-linear"
BLOCKS = ("layers", "h", "blocks")
"""Attributes that hold the numbered decoder blocks."""


def problems(config: Config, names: LayerNames | None) -> Iterator[Problem]:
    """Targets and patterns in which nothing can be found. Only plain names are judged, no other regular expressions."""
    if "train" not in config.jobs:
        return
    if config.adapter.kind is not AdapterKind.none:
        yield from _targets(config, names)
        yield from _experts(config, names)
    if names and config.parallel.tensor_ranks > 1:
        yield from _tensor_plan(config, names)
    for key, pattern in _patterns(config):
        plain = pattern.replace("\\.", ".")
        if names and re.fullmatch(r"[\w.]+", plain) and (part := _unknown(plain, names, config, whole=False)):
            yield Problem(key, pattern, _message(part, names))


def _patterns(config: Config) -> Iterator[tuple[str, str]]:
    """(key, regular expression of a name) of all that name layers or weights."""
    patterns = {"train.unfrozen": config.train.unfrozen, "train.learning_rates": list(config.train.learning_rates)}
    if config.adapter.kind is not AdapterKind.none:
        patterns |= {
            "adapter.rank_pattern": list(config.adapter.rank_pattern),
            "adapter.alpha_pattern": list(config.adapter.alpha_pattern),
            "adapter.modules_to_save": config.adapter.modules_to_save,
        }
    return ((key, pattern) for key, listed in patterns.items() for pattern in listed)


def _targets(config: Config, names: LayerNames | None) -> Iterator[Problem]:
    targets = config.adapter.targets
    if not targets:
        yield Problem("adapter.targets", "[]", f"names no layer. Use adapter.targets=[{ALL}]")
    elif ALL in targets and len(targets) > 1:
        message = (
            f"{ALL} stands for all linear layers, and must be alone. Use adapter.targets=[{ALL}], or name each layer"
        )
        yield Problem("adapter.targets", f"[{','.join(targets)}]", message)
    for target in targets if names and ALL not in targets else ():
        last = target.rpartition(".")[2]
        if names and (part := _unknown(target, names, config, whole=True)):
            yield Problem("adapter.targets", target, _message(part, names))
        elif names and last in names.other_classes and last not in names.weights:
            message = f"is a {names.other_classes[last]}, which PEFT cannot adapt. "
            message += f"Name its linear layers; the model has {', '.join(names.linear)}"
            yield Problem("adapter.targets", target, message)


def _experts(config: Config, names: LayerNames | None) -> Iterator[Problem]:
    """Adapters on the matrices of all experts: without dropout or DoRA, and under ZeRO-3 only if all are called together."""
    adapter, parallel = config.adapter, config.parallel
    one_by_one = EXPERTS_ONE_BY_ONE.get(names.family, frozenset()) if names else frozenset()
    named = [item for item in adapter.targets if one_by_one & {item.rpartition(".")[2]}]
    if named and parallel.backend is Backend.zero and parallel.zero_stage == 3:
        yield Problem("adapter.targets", named[0], NOT_UNDER_ZERO_3)
    if any(names and _is_of_experts(item, names) for item in adapter.targets):
        if adapter.dropout:
            yield Problem("adapter.dropout", adapter.dropout, NO_DROPOUT)
        if adapter.dora:
            yield Problem("adapter.dora", True, NO_DORA)


def _is_of_experts(target: str, names: LayerNames) -> bool:
    """Whether a target names a weight, not a module. A name may be both: of a layer (`down_proj`), of a weight of `experts`."""
    *before, last = target.split(".")
    return last in names.weights and (last not in names.modules or "experts" in before)


def _tensor_plan(config: Config, names: LayerNames) -> Iterator[Problem]:
    """Tensor parallelism follows transformers' plan for the family."""
    if names.tensor_styles is None:
        return
    unknown = sorted(
        style for style in names.tensor_styles.difference(TENSOR_STYLES) if not style.startswith("embedding")
    )
    if names.tensor_styles and not unknown:
        return
    message = (
        f"its plan cuts layers in the style {unknown[0]}" if unknown else "transformers has no plan for its layers"
    )
    message = f"is not supported for this model: {message}. Use parallel.tensor_ranks=1"
    yield Problem("parallel.tensor_ranks", config.parallel.tensor_ranks, message)


def _unknown(name: str, names: LayerNames, config: Config, *, whole: bool) -> str | None:
    """The first part of a dotted name that no weight's name has. Of a pattern, a part may be only a piece of it."""
    before = ""
    for part in name.split("."):
        if part.isdigit():
            if before in BLOCKS and not _is_block(part, config, whole=whole):
                return f"{before}.{part}"
        elif part and not (part in names.words or (not whole and any(part in word for word in names.words))):
            return part
        before = part
    return None


def _is_block(number: str, config: Config, *, whole: bool) -> bool:
    shape = config.model.architecture
    if shape is None:
        return True
    blocks = [str(index) for index in range(shape.num_hidden_layers)]
    return number in blocks or (not whole and any(block.startswith(number) for block in blocks))


def _message(part: str, names: LayerNames) -> str:
    near = difflib.get_close_matches(part, names.linear, n=1, cutoff=0.6)
    hint = f": did you mean '{near[0]}'?" if near else "."
    return f"the model has no layer {part}{hint} Its linear layers are {', '.join(names.linear)}"
