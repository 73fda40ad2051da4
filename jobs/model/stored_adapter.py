"""Loads the weights of the adapter that training goes on from (`adapter.source`)."""

from collections.abc import Mapping
from pathlib import Path

from conf.errors import ConfigError, DataError, Problem
from conf.schema import Config
from jobs.model.saved_names import name_in_adapter_file
from jobs.tensor_io import safetensors, slices
from jobs.tensor_io.slices import TensorPart

KEY, STEM = "adapter.source", "adapter_model"
MAX_LISTED = 10


def fill(parts: Mapping[str, TensorPart], config: Config) -> None:
    """Fill `parts` from the files of `adapter.source`. Each rank reads its own slices.

    `parts` are all weights that are trained. Raises ConfigError with each that is missing, unexpected or of another shape.
    """
    source = str(config.adapter.source)
    folder = Path(source)
    try:
        stored = safetensors.find_tensors(folder, STEM)
    except (OSError, DataError) as error:
        raise ConfigError(Problem(KEY, source, f"cannot be read on this node: {error}")) from error
    names = {name: [name_in_adapter_file(name)] for name in parts}
    problems = slices.mismatches(stored, names, {name: part.shape for name, part in parts.items()})
    if problems:
        remedy = "Set model.source to the model that this adapter was trained on, and the keys of `adapter` as they were then"
        more = [f"{len(problems) - MAX_LISTED} more tensors do not fit"] if len(problems) > MAX_LISTED else []
        raise ConfigError(*(Problem(KEY, source, f"{text}. {remedy}") for text in problems[:MAX_LISTED] + more))
    slices.read(folder, [(stored[names[name][0]], part) for name, part in parts.items()], show=False)
