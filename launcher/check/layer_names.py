"""Reads the names of a family's layers from the source of the installed transformers: importing it takes seconds."""

import importlib.util
import re
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

    words: frozenset[str] = field(default_factory=frozenset)
    """Every word of the family's source. A name that has another word does not exist."""
    linear: tuple[str, ...] = ()
    """The attributes that hold a linear layer."""


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
    linear = re.findall(r"self\.(\w+)\s*=\s*(?:nn\.Linear|Conv1D)\(", source)
    return LayerNames(frozenset(re.findall(r"\w+", source)) | WRAPPERS, tuple(dict.fromkeys(linear)))
