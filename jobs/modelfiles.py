"""Which files of a folder hold a model's weights, and how they are read. Imports no torch."""

import json
from pathlib import Path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 16 * 2**20
READERS = 4
"""Threads that read, each with one chunk in host memory: a network file system is fast only when asked for several at once."""


def files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, as transformers would choose them."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
