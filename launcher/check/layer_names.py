"""Reads the names of a family's layers from the source of the installed transformers: importing it takes seconds."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conf.choices import Init
from conf.schema import Config

WRAPPERS = frozenset({
    *("model", "transformer", "base_model", "default", "weight", "bias", "modules_to_save", "base_layer"),
    *("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
})  # fmt: skip
"""Parts of names that come from torch and PEFT."""


@dataclass(frozen=True)
class LayerNames:
    """What names of layers and weights can be made of."""

    family: str = ""
    """`model_type` of the model of text."""
    words: frozenset[str] = field(default_factory=frozenset)
    """Every word of the family's source. A name that has another word does not exist."""
    linear: tuple[str, ...] = ()
    """The attributes that hold a linear layer."""
    modules: frozenset[str] = field(default_factory=frozenset)
    """The attributes that hold a module."""
    weights: frozenset[str] = field(default_factory=frozenset)
    """The attributes that hold a weight: of norms, and the matrices of all experts in one."""
    other_classes: Mapping[str, str] = field(default_factory=dict)
    """The attributes that never hold a layer of torch, but a module of the family's own -> its class: mlp, self_attn."""
    tensor_styles: frozenset[str] | None = None
    """How transformers' tensor-parallel plan cuts the layers; empty without a plan, None if it is not known."""


def read(config: Config, text_family: str | None) -> LayerNames | None:
    """The names of a family. None if they are not known: no transformers, code of the model's own, or parts of other families."""
    shape = config.model.architecture
    family = text_family or (shape.model_type if shape else None)
    if family is None or (config.model.trust_remote_code and config.model.init is Init.pretrained):
        return None
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return None
    module = family.replace("-", "_")
    path = Path(found.origin).parent / f"models/{module}/modeling_{module}.py"
    try:
        source = path.read_text(encoding="utf-8")
    except OSError:
        return None
    if "AutoModel" in source or re.search(
        r"^from \.\.\w+\.modeling_", source, re.MULTILINE
    ):  # parts are of other families
        return None
    made = re.findall(r"self\.(\w+)\s*=\s*(?!nn\.Parameter)([\w.]+)\(", source)
    return LayerNames(
        family,
        frozenset(re.findall(r"\w+", source)) | WRAPPERS,
        tuple(dict.fromkeys(name for name, kind in made if kind in ("nn.Linear", "Conv1D"))),
        frozenset(name for name, _ in made),
        frozenset(re.findall(r"self\.(\w+)\s*=\s*nn\.Parameter\(", source)),
        _other_classes(source, made),
        _tensor_styles(path.with_name(f"configuration_{module}.py")),
    )


def _other_classes(source: str, made: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The attributes among (attribute, class) that hold only modules of this source, none of which is a kind of torch's layer."""
    bases = dict(re.findall(r"^class (\w+)\(([^)]*)\):", source, re.MULTILINE))
    own = {name for name, base in bases.items() if not re.search("Linear|Embedding|Conv", base)}
    return {name: kind for name, kind in made if all(other in own for attribute, other in made if attribute == name)}


def _tensor_styles(path: Path) -> frozenset[str] | None:
    """The styles of the plan in the source of a family's config; None if it has several, or may inherit one."""
    try:
        source = path.read_text(encoding="utf-8")
    except OSError:
        return None
    plans = re.findall(r"base_model_tp_plan = \{(.*?)\}", source, re.DOTALL)
    if len(plans) > 1 or re.search(r"^from \.\.\w+\.configuration_", source, re.MULTILINE):
        return None
    return frozenset(re.findall(r':\s*"(\w+)"', plans[0])) if plans else frozenset()
