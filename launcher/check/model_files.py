"""Looks at a model's files without reading weights: in a folder, or in the copy that the Hub's cache has of it.

It only reports: `launcher.check.model_rules` decides what is wrong. Nothing is downloaded.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.check import model_damage
from launcher.check.json_file import read_json

SMALL_TOKENIZER = 2**22
"""Bytes of a tokenizer.json that is read as a whole. Of a larger one only the last entry of the vocabulary is read."""


@dataclass(frozen=True)
class ModelFiles:
    """What lies in the folder of `model.source`."""

    local: bool
    """It is a folder of the user, not a copy in the Hub's cache, which may hold only some of the files."""
    names: tuple[str, ...]
    """Files and folders in it."""
    fields: Mapping[str, Any] | None = None
    """The content of config.json; None if there is none, or if it cannot be read."""
    error: str | None = None
    """Why config.json cannot be read."""
    adapter: Mapping[str, Any] | None = None
    """The content of PEFT's adapter_config.json, if there is one."""
    quantization: Mapping[str, Any] | None = None
    """The content of quantize_config.json, which older GPTQ models have."""
    tokens: int | None = None
    """Tokens of the tokenizer (at least), with those that were added; None if it is not known."""
    base_tokens: int | None = None
    """Tokens of its vocabulary (at least), without those that were added."""
    tokenizer: Mapping[str, Any] | None = None
    """The content of tokenizer_config.json, with that of special_tokens_map.json."""
    damage: tuple[str, ...] = ()
    """Why weights in a folder of the user cannot be read."""
    tokenizer_damage: str | None = None
    """Why no tokenizer can be read from its folder, if that is one of the user."""


@dataclass(frozen=True)
class Families:
    """Values of `model_type` that this machine's transformers can build."""

    text: frozenset[str] = field(default_factory=frozenset)
    """Models of text, which Muster trains."""
    multimodal: frozenset[str] = field(default_factory=frozenset)
    """Models of images or sound and text, which are not among `text`."""


def find(source: str, revision: str | None, hub_cache: Path) -> Path | None:
    """The folder of a model: `source` itself, or its snapshot in the Hub's cache. None if it is not on this machine."""
    if Path(source).exists():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return None
    repository = hub_cache / f"models--{source.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def read(folder: Path, tokenizer: Path | None, *, local: bool) -> ModelFiles:
    """What is in a folder. `tokenizer` is the folder of the tokenizer, if it is on this machine."""
    if folder.is_file():
        return ModelFiles(local, (folder.name,))
    try:
        names = tuple(sorted(item.name for item in folder.iterdir()))
    except OSError as unreadable:
        return ModelFiles(local, (), error=f"cannot be read ({unreadable.strerror})")
    fields, error = read_json(folder / "config.json")
    tokens, base_tokens = tokenizer_sizes(tokenizer / "tokenizer.json") if tokenizer else (None, None)
    settings = None
    if tokenizer and (stored := read_json(tokenizer / "tokenizer_config.json")[0]):
        settings = (read_json(tokenizer / "special_tokens_map.json")[0] or {}) | stored
    return ModelFiles(
        local,
        names,
        fields,
        error,
        read_json(folder / "adapter_config.json")[0],
        read_json(folder / "quantize_config.json")[0],
        tokens,
        base_tokens,
        settings,
        tuple(model_damage.of_weights(folder, names)) if local else (),
        model_damage.of_tokenizer(tokenizer) if local and tokenizer else None,
    )


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of a folder, from the headers of the files; 0 if they cannot be read."""
    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    except OSError:
        return 0
    return total


def tokenizer_sizes(path: Path) -> tuple[int | None, int | None]:
    """(all tokens, those of the vocabulary) of a tokenizer.json. Of a large file: what its last entry says, at least."""
    try:
        if path.stat().st_size > SMALL_TOKENIZER:
            return _large_tokenizer(path.read_bytes())
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        base = max(ids) + 1
        added = [int(item["id"]) + 1 for item in content.get("added_tokens") or ()]
        return max(base, *added, 0), base
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def _large_tokenizer(text: bytes) -> tuple[int | None, int | None]:
    """The same from the bytes around the vocabulary: reading 10 MB of JSON would take longer than the rest of a launch."""
    start, end = text.find(b'"vocab"'), text.rfind(b'"merges"')
    match = re.search(rb":\s*(\d+)\s*\}\s*,\s*$", text[max(0, end - 200) : end]) if 0 <= start < end else None
    if match is None:
        return None, None
    base = int(match[1]) + 1
    added = re.findall(rb'"id":\s*(\d+)', text[: min(start, SMALL_TOKENIZER)])
    return max(base, *(int(item) + 1 for item in added)), base


def families() -> Families | None:
    """What the installed transformers can build, from the text of its source: importing it takes seconds."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return None
    try:
        text = (Path(found.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8")
    except OSError:
        return None
    named = {}
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        _, _, rest = text.partition(f"\nMODEL_FOR_{mapping}_MAPPING_NAMES")
        named[mapping] = frozenset(re.findall(r'\(\s*"([\w.-]+)",\s*["(]', rest.partition("\n)")[0]))
    if "llama" not in named["CAUSAL_LM"]:  # another layout of the file: say nothing
        return None
    return Families(named["CAUSAL_LM"], (named["IMAGE_TEXT_TO_TEXT"] | named["MULTIMODAL_LM"]) - named["CAUSAL_LM"])
