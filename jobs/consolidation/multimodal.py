"""Merges the trained text of a multimodal model into the whole model: its towers are copied from the base, byte for byte."""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import DataError, Problem
from conf.files import read_json, write_json
from jobs.consolidation.merge import Merge
from jobs.consolidation.plan import Output
from jobs.consolidation.tied_weights import stored_equal
from jobs.consolidation.weight_names import BASE, Blueprint
from jobs.tensor_io import safetensors
from jobs.tensor_io.layout import StoredTensor

if TYPE_CHECKING:  # imports torch, which a merge without an adapter does not need
    from jobs.consolidation.adapter_layers import AdapterPlan
    from jobs.model.multimodal import WholeModel

PROCESSOR_FILES = ("*processor_config.json",)
"""Patterns of the settings with which images and sound are prepared."""


def names_in_result(model: Any) -> Callable[[str], str]:
    """Name in training -> in the result: the model of text has other names inside a multimodal model."""
    from jobs.model.multimodal import whole_of

    whole = whole_of(model)
    return whole.name if whole is not None else str


def text_of_base(
    whole: "WholeModel", blueprint: Blueprint, base: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """(the text in the files of the base under the names of `blueprint`, name in `blueprint` -> name in the files)."""
    memory, _ = whole.in_memory(base)
    by_live = {live: name for name, live in memory.items() if live in whole.text_names}
    found = {live: base[name] for live, name in by_live.items()}
    names: dict[str, str] = {}
    for saved in blueprint.saved:
        if saved.shape == blueprint.live[saved.live] and saved.live in by_live:
            names[saved.name] = by_live[saved.live]
            found[saved.name] = base[by_live[saved.live]]
        elif saved.name in base:
            found[saved.name] = base[saved.name]
    return found, names


def rename_adapters(plan: "AdapterPlan", whole: "WholeModel") -> "AdapterPlan":
    """The adapters of the model of text under the names of the whole model."""
    layers = {
        whole.name(module): replace(layer, module=whole.name(module), weight=whole.name(layer.weight))
        for module, layer in plan.layers.items()
    }
    trained, embeddings = (frozenset(map(whole.name, names)) for names in (plan.trained, plan.embeddings))
    return replace(plan, layers=layers, trained=trained, embeddings=embeddings)


def name_as_in_base(merge: Merge, names: Mapping[str, str]) -> None:
    """Give each output the name that its weight has in the files of the base."""
    merge.live_names = {names[output.name]: output.name for output in merge.outputs if output.name in names}
    merge.outputs = [replace(output, name=names.get(output.name, output.name)) for output in merge.outputs]


def surplus_patterns(ignored: Iterable[str], model: Any) -> list[str]:
    """Patterns of stored tensors that training does not use: those of the user, and layers that predict several tokens.

    transformers names the latter for its classes, among buffers of older versions, which a result does not need.
    """
    of_class = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [*ignored, *(item for item in of_class if "mtp" in item or r"layers\." in item)]


def surplus(patterns: Iterable[str], blueprint: Blueprint, base: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of the base that match one of the patterns and are no weights of the model: layers that training does not use."""
    used = {saved.name.removeprefix(blueprint.prefix) for saved in blueprint.saved}
    used |= {name.removeprefix(blueprint.prefix) for name in (*blueprint.live, *blueprint.tied)}
    return {
        name: stored
        for name, stored in base.items()
        if name.removeprefix(blueprint.prefix) not in used and any(re.search(pattern, name) for pattern in patterns)
    }


def copy_from_base(merge: Merge, tensors: Mapping[str, StoredTensor]) -> None:
    """Add tensors of the base to the result as they are: same name, dtype and bytes."""
    taken = {output.name for output in merge.outputs}
    if twice := sorted(taken & tensors.keys()):
        message = f"holds {twice[0]} beside a weight that is trained under that name: it is not merged"
        raise DataError(Problem("model.source", None, message))
    for name, stored in tensors.items():
        merge.sources[BASE + name] = stored
        merge.outputs.append(Output(name, stored.shape, stored.dtype, BASE + name))
    merge.copied |= tensors.keys()


def check_towers(whole: "WholeModel", folder: Path, base: Mapping[str, StoredTensor]) -> None:
    """Raise DataError unless a written folder has the towers of the base bit for bit, under any name that loads them."""
    from jobs.model.multimodal import towers

    written = safetensors.find_tensors(folder)
    names = {memory: name for name, memory in whole.in_memory(written)[0].items()}
    in_memory, rearranged = whole.in_memory(towers(whole, base))
    for name, memory in (in_memory | rearranged).items():
        if name in rearranged or memory not in names or not stored_equal(written[names[memory]], base[name]):
            message = f"{name} is not written as the base has it: this model cannot be merged here"
            raise DataError(Problem("model.source", None, message))


def write_config(folder: Path, base: Path, config: Any, dtype: str, *, untied: bool) -> None:
    """config.json of the base with what training changed, its generation config and the files of its processor.

    `config` is that of the whole model in memory, `dtype` that of the trained weights.
    """
    fields: dict[str, Any] = read_json(base / "config.json")
    text = config.get_text_config()
    inner = fields.get(next((name for name, value in vars(config).items() if value is text), ""))
    sections = [fields, inner] if isinstance(inner, dict) else [fields]
    fields.pop("torch_dtype", None)
    fields["dtype"] = dtype
    changed = {name: fields["dtype"] for name in ("dtype", "torch_dtype")}
    if text.vocab_size > sections[-1].get("vocab_size", text.vocab_size):
        changed["vocab_size"] = text.vocab_size
    if untied or not config.tie_word_embeddings:
        fields["tie_word_embeddings"] = changed["tie_word_embeddings"] = False
    for section in sections:
        section |= {name: value for name, value in changed.items() if name in section}
    write_json(folder / "config.json", fields)
    for pattern in ("generation_config.json", *PROCESSOR_FILES):
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
