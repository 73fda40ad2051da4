"""Where a model's files are, which of them hold its weights, and how they are read. Imports no torch."""

import json
from pathlib import Path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 16 * 2**20
READERS = 4
"""Threads that read, each with one chunk in host memory: a network file system is fast only when asked for several at once."""


def find(source: str, revision: str | None, *, cached: bool = False) -> Path | None:
    """The folder that holds the safetensors files of a Hub id or of a folder, downloaded if need be; None where there are none.

    HF_HUB_OFFLINE is honoured, and `cached` asks the Hub nothing: another process has just been there. Only the files that
    the index names are fetched: many repositories hold the weights twice.
    """
    if Path(source).is_dir():
        return Path(source) if any((Path(source) / name).exists() for name in (SINGLE, INDEX)) else None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in (SINGLE, INDEX):
        try:
            found = Path(hf_hub_download(source, name, revision=revision, local_files_only=cached)).parent
        except EntryNotFoundError:
            continue
        if not cached:  # by commit, not by branch: that may have moved since
            snapshot_download(source, revision=found.name, allow_patterns=[*files(found), "*.json"])
        return found
    return None


def files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, as transformers would choose them."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
