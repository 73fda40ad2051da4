"""Names a tokenised set by everything that its tokens depend on, so that it is made once and never stale."""

import hashlib
import importlib.metadata
import json
import time
from enum import Enum
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from conf.files import read_json, write_json
from conf.schema import Data, DataSet
from jobs import sources

FORMAT = 1
"""Of the files of a set; raise it when the same rows would become other files."""
SETTLED_S = 10.0
"""A file younger than this may be written to again within one tick of its clock, so its hash is not remembered."""


def key(one: DataSet, data: Data, words: PreTrainedTokenizerBase, shape: str, cache: Path) -> str:
    """20 hexadecimal digits: of the rows' bytes, the tokenizer, its template, and the settings that shape a sample."""
    settings = {name: getattr(data, name) for name in ("mask", "max_length", "overlong", "max_rows")}
    described = {
        "format": FORMAT,
        "rows": _content(one.path, cache),
        "part": one.split,
        "shape": [shape, one.fields, one.roles],
        "tokenizer": tokenizer(words),
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    }
    return _digest(described)[:20]


def tokenizer(words: PreTrainedTokenizerBase) -> str:
    """Of everything in a tokenizer that decides ids: its merges and rules, its named tokens, its template."""
    backend = getattr(words, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else words.get_vocab()
    return _digest([type(words).__name__, rules, words.special_tokens_map, words.chat_template])


def _content(path: str, cache: Path) -> Any:
    """The hash of each file by its order, whatever it is called; of a Hub set, the fingerprint that `datasets` keeps."""
    files = sources.files(path)
    if files is None:
        return sources.hub(path)._fingerprint
    return [(sources.kind(file), _file_hash(file, cache / ".hashes.json")) for file in files]


def _file_hash(file: Path, memory: Path) -> str:
    """SHA-256 of a file, remembered for as long as its size, its times and its inode stay."""
    found = file.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    known = read_json(memory) or {}
    if (before := known.get(str(file.resolve()))) and before["state"] == state:
        return str(before["sha256"])
    found_hash = _sha256(file)
    if time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_S:
        write_json(memory, known | {str(file.resolve()): {"state": state, "sha256": found_hash}})
    return found_hash


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with (
        file.open("rb") as opened,
        tqdm(desc=f"hash {file.name}", total=file.stat().st_size, unit="B", unit_scale=True, delay=2) as bar,
    ):
        while chunk := opened.read(2**22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _digest(value: Any) -> str:
    def plain(item: Any) -> Any:
        return item.name if isinstance(item, Enum) else str(item)

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()
