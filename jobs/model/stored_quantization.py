"""Models whose files are quantized, but which are trained and merged with plain weights: their config, and how they are loaded."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from conf import stored_quantization
from conf.errors import ConfigError, Problem
from conf.schema import Config


def take_from(model_config: PreTrainedConfig, config: Config) -> Mapping[str, Any] | None:
    """Remove what a model's config says of quantization, and return it; None if the weights are stored plain.

    Raises ConfigError if they cannot be dequantized.
    """
    section = stored_quantization.find(model_config.to_dict())
    if section is None:
        return None
    if not stored_quantization.can_dequantize(section):
        message = f"is stored quantized ({stored_quantization.label(section)}): set model.source to the original model"
        raise ConfigError(Problem("model.source", config.model.source, message))
    remove(model_config)
    return section


def remove(model_config: PreTrainedConfig) -> None:
    """Make the config that of plain weights."""
    for part in {id(item): item for item in (model_config, model_config.get_text_config())}.values():
        for name in stored_quantization.SECTIONS:
            if hasattr(part, name):
                delattr(part, name)


def attach(model: PreTrainedModel, section: Mapping[str, Any] | None) -> None:
    """Note on a model without weights how its files store them."""
    model.stored_quantization = section  # type: ignore[assignment] # pretrained reads it


def section(model: PreTrainedModel) -> Mapping[str, Any] | None:
    """What `attach` noted."""
    found: Mapping[str, Any] | None = getattr(model, "stored_quantization", None)
    return found


def load_options(section: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of `from_pretrained` that dequantize a model while it is loaded."""
    if section is None or not stored_quantization.can_dequantize(section):
        return {}
    from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

    method = section.get("quant_method")
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if method == "fp8":
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
