"""What an adapter consists of and how it is scaled, read from PEFT's own model on the meta device; refuses what cannot be merged.

PEFT decides which layers its settings reach, how each is scaled and which other weights are trained. So PEFT is asked, and the
names in a checkpoint are compared with what it says.
"""

import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from conf.errors import DataError, Problem, first_line
from jobs.model import first_update

REMEDY = (
    "merge it with PEFT: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
    ".merge_and_unload().save_pretrained(OUT)"
)
INITS_OF_THE_BASE = ("pissa", "olora")
"""Values of init_lora_weights for which PEFT takes the first update off the base, in a way that can be repeated."""
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is."""
NAME = first_update.NAME


@dataclass(frozen=True)
class AdapterLayer:
    """An adapter on one weight."""

    module: str
    """As PEFT names it; with two adapted weights in one module the inner one ends in `.base_layer`."""
    weight: str
    """Live name of the weight that it changes."""
    kinds: frozenset[str]
    """What a checkpoint must have of it: lora_A, lora_B, ..."""
    scale: float
    rank: int
    embedding: bool = False
    transposed: bool = False
    """The weight is stored as (columns, rows): embeddings and Conv1D."""
    experts: int = 1
    experts_transposed: bool = False
    """Expert weights stored as (experts, in, out)."""
    init: str | None = None
    """`pissa` or `olora`: the first update was taken off the base."""
    first: first_update.Pair | None = field(default=None, compare=False)
    """That update, where a run has kept it. Null: it is computed again."""


@dataclass(frozen=True)
class AdapterPlan:
    """The adapters of a model and the other weights that are trained with them."""

    layers: dict[str, AdapterLayer]
    """By module."""
    trained: frozenset[str]
    """Live names of whole weights that are trained: modules_to_save and biases."""
    embeddings: frozenset[str] = frozenset()
    """Modules of the embedding and the output head."""
    keeps_ties: bool = False
    """ensure_weight_tying: the head uses the adapter of the embedding."""


def wrap(model: Any, settings: dict[str, Any]) -> Any:
    """The PEFT model of a model on the meta device and the content of adapter_config.json.

    Raises DataError for adapters that cannot be merged, or that do not fit this model.
    """
    from peft import LoraConfig, get_peft_model

    check_settings(settings)
    known = {**settings, "init_lora_weights": False, "inference_mode": False, "lora_dropout": 0.0}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig.from_peft_type(**known))  # type: ignore[no-untyped-call] # PEFT's
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        message = f"does not fit the base: {first_line(error)}; name the model that the adapter was trained on (--base)"
        raise DataError(Problem("adapter_config.json", None, message)) from error


def check_settings(settings: dict[str, Any]) -> None:
    """Raise DataError, with PEFT's own names, for what is not a sum of the base and a low-rank update."""

    def refuse(key: str, value: object, reason: str, remedy: str = REMEDY) -> None:
        raise DataError(Problem(f"adapter_config.json: {key}", str(value), f"{reason}: {remedy}"))

    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        refuse("peft_type", kind, "only LORA can be merged here")
    if settings.get("trainable_token_indices"):
        refuse("peft_type", "LORA with trainable_token_indices", "single trained tokens are not merged here")
    init = settings.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and init not in INITS_OF_THE_BASE:
        remedy = "save it as an ordinary LoRA, with save_pretrained(path_initial_model_for_weight_conversion=...)"
        refuse("init_lora_weights", init, "it changed the base in a way that cannot be repeated", remedy)


def describe(wrapped: Any, init: object = None, keeps_ties: bool = False) -> AdapterPlan:
    """The adapters of a PEFT model. Raises DataError for a kind of layer that cannot be merged."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for name, layer in wrapped.named_modules():
        if isinstance(layer, LoraLayer):
            found = _describe_layer(name.removeprefix("base_model.model."), layer, init)
            layers[found.module] = found
    from jobs.consolidation.weight_names import live_name

    trained = {
        live_name(name)
        for name, parameter in wrapped.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and ".lora_" not in name
    }
    model = wrapped.get_base_model()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    embeddings = {
        re.sub(r"\.(base_layer|original_module|modules_to_save\..*)$", "", name)
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    }
    return AdapterPlan(layers, frozenset(trained), frozenset(embeddings), keeps_ties)


def _describe_layer(module: str, layer: Any, init: object) -> AdapterLayer:
    from peft.tuners.lora import Embedding, Linear, ParamWrapper
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    variant = layer.lora_variant.get(NAME)
    is_dora = variant in (DoraLinearVariant, DoraEmbeddingVariant) or isinstance(
        variant, DoraLinearVariant | DoraEmbeddingVariant
    )
    if not isinstance(layer, Linear | Embedding | ParamWrapper) or not (variant is None or is_dora):
        kind = type(layer).__name__ if variant is None else getattr(variant, "__name__", type(variant).__name__)
        message = f"LORA with {kind} on {module} is not merged here: {REMEDY}"
        raise DataError(Problem("adapter_config.json: peft_type", None, message))
    parts = ("lora_embedding_A", "lora_embedding_B") if isinstance(layer, Embedding) else ("lora_A", "lora_B")
    kinds = {*parts, *(["lora_magnitude_vector"] if is_dora else [])}
    base = module.replace(".base_layer", "")
    if layer.lora_bias.get(NAME):
        kinds.add("lora_B.bias")
        if getattr(layer.get_base_layer(), "bias", None) is None:
            message = f"is true, but {base} has no bias to add it to, so PEFT cannot merge it either: use it unmerged"
            raise DataError(Problem("adapter_config.json: lora_bias", True, message))
    if isinstance(layer, ParamWrapper):
        return AdapterLayer(
            module, f"{base}.{layer.parameter_name}", frozenset(kinds), layer.scaling[NAME], layer.r[NAME],
            experts=layer.num_experts, experts_transposed=not layer._did_swap_in_out_features,
        )  # fmt: skip
    transposed = isinstance(layer, Embedding) or bool(layer.fan_in_fan_out)
    if init == "olora" and transposed:
        message = f"the first update of {base}, which is stored transposed, cannot be repeated: {REMEDY}"
        raise DataError(Problem("adapter_config.json: init_lora_weights", "olora", message))
    of_base = str(init) if init in INITS_OF_THE_BASE and not isinstance(layer, Embedding) else None
    return AdapterLayer(
        module, f"{base}.weight", frozenset(kinds), layer.scaling[NAME], layer.r[NAME],
        embedding=isinstance(layer, Embedding), transposed=transposed, init=of_base,
    )  # fmt: skip


def with_first_pairs(plan: AdapterPlan, path: Path) -> AdapterPlan:
    """The plan with the matrices with which the adapters of a run began, from RUN/adapter_init.safetensors."""
    pairs = first_update.read(path, list(plan.layers))
    layers = {module: replace(layer, first=pairs[module]) for module, layer in plan.layers.items()}
    return replace(plan, layers=layers)


def check_complete(plan: AdapterPlan, found: dict[str, dict[str, str]]) -> None:
    """Raise DataError unless the checkpoint has every part of every adapter, and no other."""
    wanted = {(module, kind) for module, layer in plan.layers.items() for kind in layer.kinds}
    there = {(module, kind) for module, kinds in found.items() for kind in kinds}
    missing, unknown = sorted(wanted - there), sorted(there - wanted)
    if missing or unknown:
        shown = [", ".join(".".join(part) for part in parts[:3]) or "none" for parts in (missing, unknown)]
        message = (
            f"{len(missing)} parts of adapters are missing ({shown[0]}), {len(unknown)} are unknown ({shown[1]}): "
            "copy all files, adapter_config.json included, and name the model that was trained (model.source, --base)"
        )
        raise DataError(Problem("checkpoint", None, f"does not fit the adapter settings: {message}"))
