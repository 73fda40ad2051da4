"""Finds the tensors of a model's files under the names in memory: renamed and fused ones joined, quantized ones as numbers."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from conf.errors import ConfigError, Problem, UserError
from conf.schema import Config
from jobs.model.saved_names import CannotStream, join_stored, saved_names
from jobs.tensor_io import slices
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.model_files import find_or_download


def joined(
    base: PreTrainedModel, stored: dict[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], source: str
) -> tuple[dict[str, StoredTensor], str]:
    """The stored tensors under the names in memory, and why they cannot be read as such; empty if they can.

    transformers renames or fuses weights of some families. Fused ones are read from all of their parts. Raises ConfigError if
    some of the parts are missing.
    """
    converted = first_converted(base, stored)
    if not converted:
        return stored, ""
    why_whole = conversion(base, converted)
    try:
        found, missing = join_stored(saved_names(base), stored, shapes, f"{base.base_model_prefix}.")
    except CannotStream:
        return stored, why_whole
    if missing:
        text = f"{len(missing)} tensors are in none of the files, first {missing[0]}: download the model again"
        raise ConfigError(Problem("model.source", source, text))
    left = {name: tensor for name, tensor in found.items() if stored.get(name) is tensor}
    return (stored, why_whole) if first_converted(base, left) else (found, "")


def conversion(base: PreTrainedModel, name: str) -> str:
    """Why a model with this tensor is loaded by transformers; empty without a name."""
    return f"transformers converts {name} while loading a {base.config.model_type} model" if name else ""


def first_converted(base: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> str:
    """The first stored tensor that transformers would rename, fuse or transpose while loading; empty if there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for transform in get_model_conversion_mapping(base, add_legacy=False):
        for name in stored:
            renamed, pattern = transform.rename_source_key(name)
            if renamed != name or (pattern is not None and hasattr(transform, "operations")):
                return name
    return ""


def file_of(name: str, config: Config) -> str:
    """The file of a weight; empty if it is not known, or if parts of the weight are in several files."""
    try:
        folder = find_or_download(config.model.source, config.model.revision, cached=True)
        stored = slices.find_tensors(folder, "model.source", config.model.source) if folder else {}
    except (OSError, ValueError, UserError):
        return ""
    plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
    module = plain.rpartition(".")[0]
    parts = [stored[plain]] if plain in stored else [stored[key] for key in stored if key.startswith(f"{module}.")]
    files = {extent.path for tensor in parts for extent in tensor.extents}
    return files.pop() if len(files) == 1 else ""
