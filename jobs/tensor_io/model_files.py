"""Finds (and downloads, if need be) the safetensors files of a model, and says in what chunks they are read. Imports no torch."""

from pathlib import Path

from jobs.tensor_io.safetensors import files_of_index
from jobs.tensor_io.untrusted import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 16 * 2**20
READERS = 4
"""Threads that read, each with one chunk in host memory. A network file system is fast only with several requests at once."""


def find_or_download(source: str, revision: str | None, *, cached: bool = False) -> Path | None:
    """The folder with the safetensors files of a Hub id or of a local folder; None if it has none.

    Downloads what is missing. HF_HUB_OFFLINE is honored. With `cached` the Hub is not asked, because another process has just
    downloaded the files. Only the files that the index names are downloaded: many repositories hold the weights twice.
    Raises OSError or ValueError if the files cannot be fetched.
    """
    if Path(source).is_dir():
        return Path(source) if any((Path(source) / name).exists() for name in (SINGLE, INDEX)) else None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in (SINGLE, INDEX):
        try:
            folder = Path(hf_hub_download(source, name, revision=revision, local_files_only=cached)).parent
        except EntryNotFoundError:
            continue
        if not cached:  # by commit (the folder's name), because the branch may have moved in the meantime
            snapshot_download(source, revision=folder.name, allow_patterns=[*weight_files(folder), "*.json"])
        return folder
    return None


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, chosen as transformers chooses them.

    Raises DataError if the index is damaged or names a file outside the folder.
    """
    if (folder / SINGLE).exists():
        return [SINGLE]
    return files_of_index(folder / INDEX, read_object(folder / INDEX))
