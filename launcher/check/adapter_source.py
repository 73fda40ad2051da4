"""Reads the settings of the adapter that `adapter.source` names: training goes on from its weights, so its shape is the same."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError, Problem, as_typed, first_line
from conf.schema import Config
from conf.schema_training import Adapter
from launcher.check import model_files
from launcher.check.json_file import read_json
from launcher.check.observe import hub_cache

KEY = "adapter.source"
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAME_NAME = ("r", "rank_pattern", "alpha_pattern", "modules_to_save")
OTHER_NAME = {"lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora", "use_dora": "dora"}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that left the base as it was."""
DECIDED = (*SAME_NAME, *OTHER_NAME.values(), "targets", "layers_to_transform")
"""Keys of `adapter` whose values are those of the adapter."""
WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "eva_config", "runtime_config", "loftq_config",
)  # fmt: skip
"""Settings of PEFT that say nothing about how trained weights are used."""


def take_settings(config: Config) -> None:
    """Give `config.adapter` the settings of the adapter in `adapter.source`, and make `adapter.source` its folder, in place.

    Raises ConfigError if it is not on this machine, if Muster cannot train it further, or if a key has another value that is not
    the default.
    """
    source = str(config.adapter.source)
    folder = model_files.find(source, None, hub_cache(config))
    content, error = read_json(folder / SETTINGS) if folder else (None, None)
    if folder is None or content is None:
        reason = error or f"has no {SETTINGS} on this machine"
        message = f"{reason}. Give the folder of an adapter in PEFT's format, or fetch it first: hf download {source}"
        raise ConfigError(Problem(KEY, source, message))
    if not (folder / WEIGHTS).exists():
        message = f"has no {WEIGHTS}. Save it again with PEFT: PeftModel.from_pretrained(...).save_pretrained(...)"
        raise ConfigError(Problem(KEY, source, message))
    if refused := list(_refused(content, source)):
        raise ConfigError(*refused)
    try:
        settings = _settings(content)
        OmegaConf.merge(OmegaConf.structured(Adapter), settings)  # checks the types
    except (TypeError, ValueError, AttributeError, OmegaConfBaseException) as error:
        message = f"{SETTINGS} cannot be read: {first_line(error)}. Correct it"
        raise ConfigError(Problem(KEY, source, message)) from error
    defaults, conflicts = Adapter(), []
    for key, value in settings.items():
        current = getattr(config.adapter, key)
        if current not in (value, getattr(defaults, key)):
            message = (
                f"the adapter in {source} has {as_typed(value)}. Leave this key out, and use adapter=lora or qlora"
            )
            conflicts.append(Problem(f"adapter.{key}", as_typed(current), message))
        setattr(config.adapter, key, value)
    if conflicts:
        raise ConfigError(*conflicts)
    config.adapter.source = str(folder.absolute())


def forget_settings(config: Config, typed: Collection[str]) -> None:
    """Give the keys of `config.adapter` that another adapter decided their defaults again, but not those that are `typed`."""
    defaults = Adapter()
    for key in DECIDED:
        if f"adapter.{key}" not in typed:
            setattr(config.adapter, key, getattr(defaults, key))


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `adapter` that adapter_config.json decides."""
    defaults = Adapter()
    names = {name: name for name in SAME_NAME} | OTHER_NAME
    found = {ours: content[theirs] for theirs, ours in names.items() if content.get(theirs) is not None}
    found = {ours: found.get(ours, getattr(defaults, ours)) for ours in names.values()}
    found["alpha"], found["dropout"] = float(found["alpha"]), float(found["dropout"])
    found["alpha_pattern"] = {pattern: float(alpha) for pattern, alpha in found["alpha_pattern"].items()}
    modules, layers = content.get("target_modules"), content.get("layers_to_transform")
    targets = [modules] if isinstance(modules, str) else sorted(modules or ())
    layers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    return found | {"targets": targets + sorted(content.get("target_parameters") or ()), "layers_to_transform": layers}


def _refused(content: Mapping[str, Any], source: str) -> Iterator[Problem]:
    """A problem for each setting that Muster's adapters do not have, or that changed the base."""
    known = {*SAME_NAME, *OTHER_NAME, *WITHOUT_EFFECT, "target_modules", "target_parameters", "layers_to_transform"}
    kind, init, modules = (
        content.get("peft_type"),
        content.get("init_lora_weights", True),
        content.get("target_modules"),
    )
    if kind != "LORA":
        yield _problem(source, "peft_type", kind, "Muster trains LORA. Use adapter=lora without adapter.source")
    if init not in PLAIN_INITS:
        remedy = "save it as an ordinary LoRA, with save_pretrained(path_initial_model_for_weight_conversion=...)"
        yield _problem(source, "init_lora_weights", init, f"it changed the base. With PEFT, {remedy}")
    if isinstance(modules, str) and modules != "all-linear":
        yield _problem(
            source, "target_modules", modules, "is a regular expression. Write the names of the layers as a list"
        )
    for key, value in content.items():
        if key not in {*known, "peft_type", "init_lora_weights"} and value not in (None, False, "none", {}, []):
            remedy = "Merge it into its base with PEFT, and use that as model.source"
            yield _problem(source, key, value, f"Muster does not train such adapters. {remedy}")


def _problem(source: str, key: str, value: object, message: str) -> Problem:
    return Problem(KEY, source, f"{SETTINGS} says {key}={as_typed(value)}: {message}")
