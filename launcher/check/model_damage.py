"""Looks for files of a model folder that no job can read: pointers of Git LFS, missing shards, files that are cut off."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from conf import safetensors_file
from launcher.check.json_file import read_json

LFS_POINTER = b"version https://git-lfs"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_NAME = re.compile(r"tokenizer|vocab|merges|spiece|sentencepiece|tiktoken|tekken|bpe")
"""A part of the name of every file that a tokenizer is read from."""
LONGEST_READ = 2**22


def of_weights(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Why the weights in a folder cannot be read, in words that follow its name. Only headers and sizes are looked at."""
    for name in names:
        if name.endswith((".safetensors", ".bin")) and (why := _why_unreadable(folder / name)):
            yield f"{name} {why}"
    index = next((name for name in INDEXES if name in names and name.removesuffix(".index.json") not in names), None)
    if index is not None:
        content, error = read_json(folder / index)
        shards = content.get("weight_map") if content else None
        if not isinstance(shards, dict):
            yield error or f"{index} has no weight_map"
        elif absent := sorted({str(name) for name in shards.values()} - {*names}):
            more = f", and {len(absent) - 1} more files are missing" if len(absent) > 1 else ""
            yield f"{absent[0]} is missing, which {index} names{more}"


def of_tokenizer(folder: Path) -> str | None:
    """Why no tokenizer can be read from a folder; None if nothing is wrong."""
    if folder.is_file():
        return "is a file. Name the folder that it is in"
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not any(TOKENIZER_NAME.search(name) for name in names):
        return "has no tokenizer (tokenizer.json, tokenizer.model)"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if name in names and path.stat().st_size < LONGEST_READ and (why := read_json(path)[1]):
            return f"{name} is a pointer of Git LFS" if _is_pointer(path) else why
    return None


def _why_unreadable(path: Path) -> str | None:
    try:
        if _is_pointer(path):
            return "is a pointer of Git LFS, not the file"
        if path.stat().st_size == 0:
            return "is empty"
        return "is cut off" if path.suffix == ".safetensors" and safetensors_file.is_cut_short(path) else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER
