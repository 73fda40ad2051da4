"""Maps names of weights in training to names in a model folder: prefixes of wrappers, tied weights, adapters, fused weights.

"Live" is the model in memory, as transformers builds it; its names and shapes may differ from those in a model folder.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from conf.errors import DataError, Problem

BASE = "base:"
"""Put before the names of the base's weights, because the checkpoint may have a weight of the same name."""
AGAIN = "again:"
"""Put before the name of a source that becomes two weights, each with another adapter."""


def is_from_base(source: str) -> bool:
    """Whether a source is a weight of the base."""
    return source.removeprefix(AGAIN).startswith(BASE)


class CannotStream(Exception):
    """Raised for a model of which a saved weight is not a run of elements of a live one, so that it cannot be streamed."""


@dataclass(frozen=True)
class SavedName:
    """A tensor that `save_pretrained` would write: the elements of a live weight from `start` on."""

    name: str
    shape: tuple[int, ...]
    live: str
    start: int = 0


@dataclass(frozen=True)
class Blueprint:
    """The names and shapes of a model, without its weights."""

    live: dict[str, tuple[int, ...]]
    """Name -> shape in memory, without the second names of tied weights."""
    tied: dict[str, str]
    """Second name -> first name."""
    saved: tuple[SavedName, ...]
    transposed: frozenset[str]
    """Weights stored as (columns, rows): those of GPT-2's Conv1D layers."""
    prefix: str = ""
    """Some base models leave this out of the names in their files: `model.`."""

    @property
    def names(self) -> frozenset[str]:
        """All names that a weight may have: in memory, the second name of a tied one, in the files."""
        return frozenset({*self.live, *self.tied, *(saved.name for saved in self.saved)})

    def base_name(self, saved: "SavedName", base: Collection[str]) -> str | None:
        """The name of a tensor in the files of a base model: its own, without the prefix, or that of a tied weight."""
        second_names = [name for name, first in self.tied.items() if first == saved.live]
        first_name = self.tied.get(saved.live, saved.name)
        own_names = [saved.name, saved.name.removeprefix(self.prefix)]
        candidates = [*own_names, *second_names, first_name, first_name.removeprefix(self.prefix)]
        return next((name for name in candidates if name in base), None)


def blueprint_of_model(model: Any, only: Collection[str] | None = None) -> Blueprint:
    """The blueprint of a transformers model on the meta device, or of its weights in `only`. Raises CannotStream."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    if only is not None:
        tied = {second: first for second, first in tied.items() if first in only}
    state = {
        name: value for name, value in model.state_dict().items() if name not in tied and (only is None or name in only)
    }
    return Blueprint(
        {name: tuple(value.shape) for name, value in state.items()},
        tied,
        tuple(_saved_names(model, state)),
        frozenset(f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"),
        f"{model.base_model_prefix}." if model.base_model_prefix else "",
    )


STORED_AS_USED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "starcoder2"}
)
"""Values of `model_type` for which transformers neither renames nor rearranges weights on loading, so that names and
shapes in the files are those in memory. A test checks each."""


def blueprint_of_files(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Blueprint | None:
    """The blueprint from config.json and the shapes in a model folder, without transformers. None if these are not enough."""
    if config.get("model_type") not in STORED_AS_USED or not shapes:
        return None
    tied = {}
    if config.get("tie_word_embeddings"):
        embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
        if embedding is None or "lm_head.weight" in shapes:
            return None
        tied = {"lm_head.weight": embedding}
    return blueprint_of_names(shapes, tied)


def blueprint_of_names(shapes: dict[str, tuple[int, ...]], tied: dict[str, str] | None = None) -> Blueprint:
    """The blueprint of weights that have the same names and shapes in files and in the checkpoint."""
    saved = tuple(SavedName(name, shape, name) for name, shape in shapes.items())
    return Blueprint(dict(shapes), tied or {}, saved, frozenset())


def _saved_names(model: Any, state: dict[str, Any]) -> Iterable[SavedName]:
    """Which elements of which live weight each saved tensor is.

    transformers renames, fuses and splits weights on loading, and can revert that. It is reverted here with weights that are
    views of one large empty tensor (the arena). The offset of a result in the arena then says which elements it is made of.

    Example: Mixtral fuses the matrices w1 and w3 of its 4 experts into `gate_up_proj` of shape (4, 2 x 96, 64), which has
    49,152 elements. Say that this weight begins at element 8,192 of the arena. The reverted `experts.1.w3.weight`, of shape
    (96, 64), then lies at 8,192 + 12,288 (expert 0) + 6,144 (w1 of expert 1) = 26,624. So it is
    SavedName("...experts.1.w3.weight", (96, 64), "...gate_up_proj", start=18,432).
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    class ArenaView(torch.Tensor):
        """A view of the arena that stays a view where transformers would copy it."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.contiguous, torch.Tensor.clone):
                return args[0]
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    arena = torch.empty(sum(value.numel() for value in state.values()), device="meta").as_subclass(ArenaView)
    ranges, views, end = [], {}, 0
    for name, value in state.items():
        begin, end = end, end + value.numel()
        views[name] = arena[begin:end].view(value.shape)
        ranges.append((begin, end, name))
    try:
        reverted = revert_weight_conversion(model, dict(views))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise CannotStream(str(error)) from error
    saved = []
    for name, view in reverted.items():
        # a result elsewhere was copied, and one with strides was transposed: neither is a run of a live weight
        if view.untyped_storage()._cdata != arena.untyped_storage()._cdata or not view.is_contiguous():
            raise CannotStream(name)
        saved.append((view.storage_offset(), name, tuple(view.shape)))
    number = 0
    for offset, name, shape in sorted(saved, key=lambda item: item[0]):
        while offset >= ranges[number][1] and number + 1 < len(ranges):
            number += 1
        begin, _, live = ranges[number]
        yield SavedName(name, shape, live, offset - begin)


_ADAPTER_WEIGHT = re.compile(
    r"^(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?P<adapter>(?!weight$|bias$)[^.]+))?(\.(?P<part>weight|bias))?$"
)
"""`q_proj.lora_A.default.weight`, `embed_tokens.lora_embedding_B.default`, `q_proj.lora_A.weight`, `q_proj.lora_B.bias`."""
_MODULES_TO_SAVE = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")
"""`lm_head.modules_to_save.default.weight`."""
_ORIGINAL = ".original_module."
"""The copy that PEFT keeps of a module in modules_to_save: `lm_head.original_module.weight`."""


def live_name(key: str) -> str:
    """The name in the base model of the weight that a name under PEFT belongs to; other names stay as they are."""
    bare = key.replace("base_model.model.", "", 1)
    if match := _ADAPTER_WEIGHT.match(bare):
        return f"{match['module'].replace('.base_layer', '')}.weight"
    return _MODULES_TO_SAVE.sub("", bare).replace(".base_layer.", ".").replace(_ORIGINAL, ".")


@dataclass(frozen=True)
class CheckpointNames:
    """What the names in a checkpoint are: whole weights, those that PEFT keeps beside a trained copy, parts of adapters."""

    whole: dict[str, str]
    """Live name -> name in training."""
    originals: dict[str, str]
    """Live name -> name of the frozen weight of a module that PEFT trains whole."""
    adapters: dict[str, dict[str, str]]
    """Module, as PEFT names it -> kind (lora_A, lora_B, lora_B.bias, ...) -> name in training."""

    def trained_whole(self, name: str) -> bool:
        """Whether PEFT trained this weight as a copy of its own."""
        return ".modules_to_save." in self.whole.get(name, "")


def split_names(weights: Iterable[str]) -> CheckpointNames:
    """Raises DataError if there are two adapters, or two weights of one name."""
    whole: dict[str, str] = {}
    originals: dict[str, str] = {}
    adapters: dict[str, dict[str, str]] = {}
    labels = set()
    for key in weights:
        bare = key.replace("base_model.model.", "", 1)
        if match := _ADAPTER_WEIGHT.match(bare):
            kind = match["kind"] + (".bias" if match["part"] == "bias" else "")
            adapters.setdefault(match["module"], {})[kind] = key
            labels.add(match["adapter"])
            continue
        found = originals if _ORIGINAL in bare else whole
        name = live_name(key)
        if name in found:
            message = f"holds {name} twice, as {found[name]} and {key}: save the checkpoint with one of them"
            raise DataError(Problem("checkpoint", None, message))
        found[name] = key
    if len(labels) > 1:
        shown = ", ".join(sorted(str(label) for label in labels))
        message = f"holds {len(labels)} adapters ({shown}): save the one to merge, with save_pretrained(selected_adapters=[...])"
        raise DataError(Problem("checkpoint", None, message))
    return CheckpointNames(whole, originals, adapters)
