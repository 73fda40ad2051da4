"""From the names of training to those of a model folder: prefixes, ties, and weights that transformers fuses on loading."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jobs.tensor_io.wrapper_names import without_torch_wrappers

OPTIMIZER = re.compile(r"(^|\.)(optimizers?|optim|lr_scheduler|dataloader|train_state)\.|\.(exp_avg|exp_avg_sq|step)$")
PREFIXES = ("app.", "state.", "state_dict.", "module.", "_forward_module.")


class NotViews(Exception):
    """Raised for a model whose saved weights are not runs of its live ones: it cannot be streamed."""


@dataclass(frozen=True)
class SavedName:
    """A tensor as `save_pretrained` would write it: a run of a live one."""

    name: str
    shape: tuple[int, ...]
    live: str
    start: int = 0


@dataclass(frozen=True)
class Blueprint:
    """The names and shapes of a model, without its weights."""

    live: dict[str, tuple[int, ...]]
    """Of the model in memory, without the second names of tied weights."""
    tied: dict[str, str]
    """Second name to first."""
    saved: tuple[SavedName, ...]
    buffers: frozenset[str]
    transposed: frozenset[str]
    """Weights of layers that multiply from the right (GPT-2's): stored as (columns, rows)."""
    prefix: str = ""
    """What the files of some bases leave out before a name, such as `model.`."""

    def base_name(self, saved: "SavedName", base: Iterable[str]) -> str | None:
        """Under which name a base's files have a tensor, if they have it: its own, a shorter, or a tied one's."""
        second = [name for name, first in self.tied.items() if first == saved.live]
        candidates = [saved.name, saved.name.removeprefix(self.prefix), *second]
        return next((name for name in candidates if name in base), None)


def blueprint(model: Any) -> Blueprint:
    """Of a transformers model built on the meta device. Raises NotViews."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    return Blueprint(
        {name: tuple(value.shape) for name, value in state.items()},
        tied,
        tuple(_saved(model, state)),
        frozenset(name for name, _ in model.named_buffers()),
        frozenset(f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"),
        f"{model.base_model_prefix}." if model.base_model_prefix else "",
    )


STORED_AS_USED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "starcoder2"}
)
"""Families whose weights transformers neither renames nor turns on loading: the files of a base say all (a test looks)."""


def of_files(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Blueprint | None:
    """The same from config.json and the headers of a model folder, without importing a model; None where that may not do."""
    if config.get("model_type") not in STORED_AS_USED or not shapes:
        return None
    tied = {}
    if config.get("tie_word_embeddings"):
        first = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
        if first is None or "lm_head.weight" in shapes:
            return None
        tied = {"lm_head.weight": first}
    saved = tuple(SavedName(name, shape, name) for name, shape in shapes.items())
    return Blueprint(dict(shapes), tied, saved, frozenset(), frozenset())


def _saved(model: Any, state: dict[str, Any]) -> Iterable[SavedName]:
    """transformers' own reversal of what it does on loading, run on views of one empty storage: where a result lies in
    that storage says which elements of which weight it is."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    class Placed(torch.Tensor):
        """A view of the arena that stays one where a real tensor would be copied."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.contiguous, torch.Tensor.clone):
                return args[0]
            return super().__torch_function__(func, types, args, kwargs or {})

    arena = torch.empty(sum(value.numel() for value in state.values()), device="meta").as_subclass(Placed)
    begins, views, at = [], {}, 0
    for name, value in state.items():
        views[name] = arena[at : at + value.numel()].view(value.shape)
        begins.append((at, at + value.numel(), name))
        at += value.numel()
    try:
        reverted = revert_weight_conversion(model, dict(views))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise NotViews(str(error)) from error
    found = []
    for name, view in reverted.items():
        if view.untyped_storage()._cdata != arena.untyped_storage()._cdata or not view.is_contiguous():
            raise NotViews(name)
        found.append((view.storage_offset(), name, tuple(view.shape)))
    number = 0
    for offset, name, shape in sorted(found, key=lambda item: item[0]):
        while offset >= begins[number][1] and number + 1 < len(begins):
            number += 1
        yield SavedName(name, shape, begins[number][2], offset - begins[number][0])


def plain(tensors: dict[str, Any], expected: Iterable[str] | None = None) -> dict[str, Any]:
    """The weights among the tensors of a checkpoint, without the prefixes that wrappers and trainers put before names.

    `expected` are names of the live model; without them, the prefix is guessed from the names alone.
    """
    found = {without_torch_wrappers(key): value for key, value in tensors.items() if not OPTIMIZER.search(key)}
    prefix = _known_prefix(found, expected) if expected is not None else None
    if prefix is None:
        prefix = _guessed_prefix(found)
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def _known_prefix(keys: Iterable[str], expected: Iterable[str]) -> str | None:
    """What stands before the names that are expected; None where none of them is there."""
    counts: dict[str, int] = {}
    wanted = set(expected)
    for key in keys:
        bare = live_name(key)
        parts = bare.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                prefix = ".".join(parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    if not counts:
        return None
    best = max(counts, key=lambda prefix: counts[prefix])
    return f"{best}." if best else ""


def _guessed_prefix(keys: Iterable[str]) -> str:
    names, prefix = list(keys), ""
    changed = bool(names)
    while changed:
        changed = False
        for candidate in PREFIXES:
            if all(name.startswith(candidate) for name in names):
                names, prefix, changed = [name.removeprefix(candidate) for name in names], prefix + candidate, True
    if names and all(name.startswith("model.") for name in names):
        rest = [name.removeprefix("model.") for name in names]
        own = any(name.startswith("embed_tokens.") for name in rest)  # a causal model's decoder is `model` itself
        if any(name.startswith(("model.", "lm_head.", "base_model.")) for name in rest) or not own:
            prefix += "model."
    return prefix


PEFT = re.compile(
    r"^(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$)[^.]+)?(\.weight)?$"
)
KEPT = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")


def live_name(key: str) -> str:
    """The base model's name of the weight that a name under PEFT belongs to; other names stay."""
    bare = key.replace("base_model.model.", "", 1)
    if match := PEFT.match(bare):
        return f"{match['module']}.weight"
    return KEPT.sub("", bare).replace(".base_layer.", ".")


def adapters(weights: Iterable[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Live name to name in training of each whole weight; and for each adapted weight its parts: kind (lora_A, ...) to name."""
    whole: dict[str, str] = {}
    parts: dict[str, dict[str, str]] = {}
    for key in weights:
        match = PEFT.match(key.replace("base_model.model.", "", 1))
        if match:
            parts.setdefault(f"{match['module']}.weight", {})[match["kind"]] = key
        elif ".original_module." not in key:
            whole[live_name(key)] = key
    return whole, parts
