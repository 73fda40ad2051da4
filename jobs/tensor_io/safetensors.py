"""Model folders of safetensors files: headers in, headers out; the bytes between are somebody else's work."""

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any

from conf.errors import DataError, Problem
from conf.files import read_json
from jobs.tensor_io.dtypes import EVERY, Dtype
from jobs.tensor_io.layout import Extent, Stored

DTYPES = {
    "F64": EVERY["float64"], "F32": EVERY["float32"], "F16": EVERY["float16"], "BF16": EVERY["bfloat16"],
    "I64": EVERY["int64"], "I32": EVERY["int32"], "I16": EVERY["int16"], "I8": EVERY["int8"], "U8": EVERY["uint8"],
    "BOOL": EVERY["bool"], "F8_E4M3": EVERY["float8_e4m3fn"], "F8_E5M2": EVERY["float8_e5m2"],
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensors(folder: Path, stem: str = "model") -> dict[str, Stored]:
    """Every tensor of a folder by its name. Raises DataError when a file is missing, cut short or no safetensors."""
    index = read_json(folder / f"{stem}.safetensors.index.json")
    if index is not None:
        files = sorted(set(index["weight_map"].values()))
    elif (folder / f"{stem}.safetensors").exists():
        files = [f"{stem}.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise DataError(Problem("model", folder, "has no safetensors files: save it with save_pretrained"))
    return {name: stored for file in files for name, stored in _file(folder / file).items()}


def _file(path: Path) -> dict[str, Stored]:
    try:
        entries, begin = header(path)
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(Problem("model", path, "is missing: copy or download it again")) from None
    except (ValueError, struct.error, OSError) as error:
        raise DataError(Problem("model", path, f"is no safetensors file: {error}")) from error
    found = {}
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        if begin + stop > size:
            said = f"is cut short: {size} of at least {begin + stop} bytes; copy or download it again"
            raise DataError(Problem("model", path, said))
        if entry["dtype"] not in DTYPES:
            raise DataError(Problem("model", path, f"{name} has dtype {entry['dtype']}, which cannot be merged"))
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        extents = (Extent(str(path), begin + start, 0, (stop - start) // dtype.itemsize),) if stop > start else ()
        found[name] = Stored(shape, dtype, extents)
    return found


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Its tensors' entries, and where the data begins."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > os.fstat(file.fileno()).st_size - 8:
            raise ValueError(f"its header should have {length} bytes")
        found = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return found, 8 + length


def head(tensors: list[tuple[str, tuple[int, ...], Dtype]]) -> tuple[bytes, list[int], int]:
    """The first bytes of a file with these tensors in this order, where the data of each begins, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, at = [], 0
    for name, shape, dtype in tensors:
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        offsets.append(at)
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 4096)  # data begins on a page
    begin = len(text) + 8
    return struct.pack("<Q", len(text)) + text, [begin + offset for offset in offsets], begin + at
