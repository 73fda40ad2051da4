"""Models whose files are quantized, but which are trained and merged with plain weights: their config, and how they are loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from conf import stored_quantization
from conf.errors import ConfigError, Problem
from conf.schema import Config
from jobs.model import multimodal
from jobs.tensor_io import dequantize, slices
from jobs.tensor_io.layout import StoredTensor
from jobs.tensor_io.model_files import find_or_download
from jobs.tensor_io.slices import TensorPart


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


def find_tensors(folder: Path, section: Mapping[str, Any] | None, source: str) -> dict[str, StoredTensor]:
    """The tensors in the files of a model, with quantized weights as their numbers. Raises ConfigError if scales are missing."""
    stored = slices.find_tensors(folder, "model.source", source)
    try:
        return dequantize.dequantized(stored, section)
    except dequantize.NotDequantized as error:
        raise ConfigError(Problem("model.source", source, f"{error}: download the model again")) from error


def from_pretrained(source: str, revision: str | None, dtype: torch.dtype | str, **options: Any) -> Any:
    """A model as transformers loads it, with its towers, dequantized if it is stored in fp8 or mxfp4.

    transformers can dequantize too, but it refuses weights of which the rows or columns are not a multiple of the block (the 576
    rows of DeepSeek's `kv_a_proj_with_mqa`), or takes blocks of another size. So it is given all weights, in memory. Raises OSError
    or ValueError if the files cannot be read, ConfigError if scales are missing.
    """
    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=options.get("trust_remote_code"))
    section = stored_quantization.find(config.to_dict())
    folder = find_or_download(source, revision) if section and stored_quantization.can_dequantize(section) else None
    if folder is None:
        return multimodal.auto_class(config).from_pretrained(source, revision=revision, dtype=dtype, **options)
    remove(config)
    wanted = torch.bfloat16 if isinstance(dtype, str) else dtype
    weights, parts = {}, []
    for name, stored in find_tensors(folder, section, source).items():
        weights[name] = torch.empty(
            stored.shape, dtype=wanted if stored.dtype.is_floating_point else stored.dtype.torch
        )
        parts.append((stored, TensorPart(stored.shape, 0, weights[name].view(-1), trained=False)))
    slices.read(folder, parts, show=False)
    trust = options.pop("trust_remote_code", None)
    with torch.device("meta"):
        model_class: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust))  # type: ignore[no-untyped-call]
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=wanted, **options)
