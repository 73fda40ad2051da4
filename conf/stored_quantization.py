"""Says from config.json whether the weights of a model are stored quantized, and whether they can be dequantized."""

from collections.abc import Iterator, Mapping
from typing import Any

SECTIONS = ("quantization_config", "compression_config")
INNER = ("text_config", "llm_config", "language_config", "thinker_config")
"""The model of text inside a multimodal one."""


def find(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of config.json that describes stored quantization; None if the weights are plain.

    A section that is not a mapping is returned as {}: quantized in an unknown way.
    """
    parts = [fields, *(fields[name] for name in INNER if isinstance(fields.get(name), Mapping))]
    found = next((part[name] for part in parts for name in SECTIONS if part.get(name)), None)
    return found if found is None or isinstance(found, Mapping) else {}


def without(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with plain weights."""
    plain = {name: value for name, value in fields.items() if name not in SECTIONS}
    return plain | {name: without(plain[name]) for name in INNER if isinstance(plain.get(name), Mapping)}


def label(section: Mapping[str, Any]) -> str:
    """In words what kind of quantization it is: `gptq, 4 bits`."""
    bits = f", {section['bits']} bits" if section.get("bits") else ""
    four, eight = (section.get(f"load_in_{size}bit") or section.get(f"_load_in_{size}bit") for size in (4, 8))
    default = "bitsandbytes" if four or eight else "of an unknown kind"
    bits = bits or (", 4 bits" if four else ", 8 bits" if eight else "")
    return f"{section.get('quant_method') or default}{bits}"


def can_dequantize(section: Mapping[str, Any]) -> bool:
    """Whether each weight is a table of 8-bit floats with scales beside it, or gpt-oss's blocks of 4-bit floats."""
    method = section.get("quant_method")
    if method == "fp8":
        size = section.get("weight_block_size")
        return size is None or (isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int for n in size))
    if method == "compressed-tensors":
        schemes = list(_schemes(section))
        return bool(schemes) and all(_is_float8(scheme) for scheme in schemes)
    return method == "mxfp4"


def block_size(section: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None if the shape of the scales says it."""
    sizes = [section.get("weight_block_size"), *(scheme.get("block_structure") for scheme in _schemes(section))]
    found = next((size for size in sizes if isinstance(size, list | tuple) and len(size) == 2), None)
    return (found[0], found[1]) if found else None


def _schemes(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        yield {"format": section.get("format"), **(weights if isinstance(weights, Mapping) else {})}


def _is_float8(scheme: Mapping[str, Any]) -> bool:
    plain = scheme.get("format") in (None, "float-quantized", "naive-quantized")
    return (
        plain
        and scheme.get("type") == "float"
        and scheme.get("num_bits") == 8
        and scheme.get("symmetric", True) is True
    )
