"""Maps names of weights in training to names in a model folder: prefixes of wrappers, tied weights, adapters, fused weights.

"Live" is the model in memory, as transformers builds it; its names and shapes may differ from those in a model folder.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from conf.errors import DataError, Problem
from jobs.model.saved_names import SavedName, live_state, saved_names

BASE = "base:"
"""Put before the names of the base's weights, because the checkpoint may have a weight of the same name."""
AGAIN = "again:"
"""Put before the name of a source that becomes two weights, each with another adapter."""


def is_from_base(source: str) -> bool:
    """Whether a source is a weight of the base."""
    return source.removeprefix(AGAIN).startswith(BASE)


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
    state, tied = live_state(model, only)
    return Blueprint(
        {name: tuple(value.shape) for name, value in state.items()},
        tied,
        tuple(saved_names(model, only)),
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
