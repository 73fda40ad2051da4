"""Says whether a safetensors file is whole, from its header and its size. Reads no tensor."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import json
from pathlib import Path

LARGEST_HEADER = 2**27
"""Bytes of the longest header that is read."""


def is_cut_short(path: Path) -> bool:
    """Whether the file ends before its header, or the last tensor that its header names. Raises OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return True
        if length > LARGEST_HEADER:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
            return size < 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False  # damaged in another way, which the program that reads it shall say
