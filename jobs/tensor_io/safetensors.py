"""Reads and makes headers of safetensors files, and finds the tensors of a model folder; it does not touch the weights."""

import json
import os
import re
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import DataError, Problem
from jobs.tensor_io.dtypes import SAFETENSORS, SAFETENSORS_NAMES, Dtype
from jobs.tensor_io.layout import Extent, StoredTensor
from jobs.tensor_io.untrusted import is_plain_name, read_object

ALIGNMENT = 4096
"""The data of files made here begins on a page of memory."""
MAX_HEADER = 100_000_000
"""Bytes of the longest header that the library safetensors reads."""


class Header(NamedTuple):
    entries: dict[str, Any]
    """Tensor name -> {"dtype": "BF16", "shape": [...], "data_offsets": [first byte, last byte + 1] from `data_start`}."""
    data_start: int
    """Byte in the file at which the data begins."""


def find_tensors(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """Every tensor of a folder by its name.

    Raises DataError if a file is missing, cut short or not in this format, or if it is not clear which files are the model.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder, stem):
        for name, stored in _tensors_to_merge(folder / file).items():
            if name in tensors:
                other = Path(tensors[name].extents[0].path).name
                message = (
                    f"{name} is in {other} and in {file}: these are the shards of ranks, or two models. "
                    "Merge the checkpoint that they come from, or leave one file of them in the folder"
                )
                raise DataError(Problem("model", folder, message))
            tensors[name] = stored
    return tensors


_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
"""`model-00002-of-00003.safetensors`."""


def _files(folder: Path, stem: str) -> list[str]:
    """Names of the files of a model: those of its index, STEM.safetensors, or the only ones in the folder."""
    index = read_object(folder / f"{stem}.safetensors.index.json")
    if index is not None:
        return files_of_index(folder / f"{stem}.safetensors.index.json", index)
    if (folder / f"{stem}.safetensors").exists():
        return [f"{stem}.safetensors"]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise DataError(Problem("model", folder, "has no safetensors files: save the model with save_pretrained"))
    numbered = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    if not numbered and len(names) == 1:
        return names
    if len(numbered) < len(names) or len({(match["stem"], match["count"]) for match in numbered}) > 1:
        message = (
            f"has {len(names)} safetensors files ({', '.join(names[:3])}, ...) and no {stem}.safetensors.index.json"
        )
        remedy = "put the files of one model into a folder of their own; join the shards of ranks with what wrote them"
        raise DataError(
            Problem("model", folder, f"{message}, so it is not known which of them are the model: {remedy}")
        )
    found = {int(match["number"]) for match in numbered}
    count = int(numbered[0]["count"])
    if missing := sorted(set(range(1, count + 1)) - found):
        message = f"lacks {len(missing)} of {count} files, first number {missing[0]}: copy them too"
        raise DataError(Problem("model", folder, message))
    return names


def files_of_index(path: Path, index: Any) -> list[str]:
    """The files that an index names. Raises DataError if one is not in the folder of the index."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(Problem("model", path, "has no weight_map: copy or download it again"))
    for name in weight_map.values():
        if not is_plain_name(name):
            message = (
                f"names {name!s:.200}, which is not in the folder of the model: write plain file names into the index"
            )
            raise DataError(Problem("model", path, message))
    return sorted(set(weight_map.values()))


def _tensors_to_merge(path: Path) -> dict[str, StoredTensor]:
    try:
        tensors = tensors_of_file(path, str(path))
    except FileNotFoundError:
        raise DataError(Problem("model", path, "is missing: copy or download it again")) from None
    except (ValueError, OSError) as error:
        raise DataError(Problem("model", path, f"{error}; copy or download it again")) from error
    for name, stored in tensors.items():
        if stored.dtype.itemsize == 0:
            raise DataError(
                Problem("model", path, f"{name:.200} has dtype {stored.dtype.name:.40}, which cannot be merged")
            )
    return tensors


def tensors_of_file(path: Path, name_in_extents: str) -> dict[str, StoredTensor]:
    """Every tensor of one file; a dtype that is not in the table gets a Dtype of 0 bytes.

    Raises OSError if the file cannot be read, ValueError if it is cut short or not in this format.
    """
    header = read_header(path)
    tensors = {}
    for name, entry in header.entries.items():
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = SAFETENSORS.get(entry["dtype"]) or Dtype(entry["dtype"], 0)
        if dtype.itemsize and stop - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"is damaged: {name} has {stop - start} bytes for {list(shape)} of {entry['dtype']}")
        tensors[name] = StoredTensor(
            shape, dtype, (Extent(name_in_extents, header.data_start + start, 0, prod(shape)),)
        )
    return tensors


def read_header(path: Path) -> Header:
    """The header of a file. Raises OSError if it cannot be read, ValueError if it is cut short or not in this format."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"is not a safetensors file, or is cut off at {size} bytes")
        if length > MAX_HEADER:
            raise ValueError(f"is not a safetensors file: its header of {length} bytes is longer than {MAX_HEADER}")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_without_doubles)
        entries.pop("__metadata__", None)
        end = 8 + length + _end_of_data(entries)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is not a safetensors file: its header is wrong ({error!s:.200})") from error
    if size < end:
        raise ValueError(f"is cut off: {size} of {end} bytes")
    return Header(entries, 8 + length)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _end_of_data(entries: dict[str, Any]) -> int:
    """Bytes of the data. Raises ValueError unless every entry is well formed and the tensors follow each other without overlap."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        numbers = [begin, stop, *entry["shape"]]
        if any(type(number) is not int or number < 0 for number in numbers) or not isinstance(entry["dtype"], str):
            raise ValueError(f"the entry of {name:.200} is damaged")
        if begin < end or stop < begin:
            raise ValueError(f"{name:.200} overlaps another tensor")
        end = stop
    return end


def make_header(tensors: list[tuple[str, tuple[int, ...], Dtype]]) -> tuple[bytes, list[int], int]:
    """The first bytes of a file with these (name, shape, dtype) in this order, the offset of each tensor, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, position = [], 0
    for name, shape, dtype in tensors:
        size = prod(shape) * dtype.itemsize
        label = SAFETENSORS_NAMES[dtype]
        entries[name] = {"dtype": label, "shape": list(shape), "data_offsets": [position, position + size]}
        offsets.append(position)
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    data_start = len(text) + 8
    header = struct.pack("<Q", len(text)) + text
    return header, [data_start + offset for offset in offsets], data_start + position
