"""Computes the cache key of a tokenized set from everything that decides its tokens, so that it is built once and never stale."""

import hashlib
import importlib.metadata
import json
import logging
import time
from contextlib import suppress
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from conf.files import read_json, write_json
from conf.schema_model import Data, DataSet
from jobs.data import hub
from jobs.data.data_files import find_files
from jobs.data.file_readers import BLOCK_ROWS, CHUNK

log = logging.getLogger(__name__)

SETTINGS = (
    *("split_thinking", "template_kwargs", "mask", "train_on", "train_on_end", "end_of_turn"),
    *("max_length", "overlong", "max_rows"),
)
"""Keys of `data` that decide a sample."""
FORMAT = 4
"""Version of the files of a set. Increase it when the same rows would give different files."""
SETTLED_S = 10.0
"""The hash of a file younger than this is not remembered: the file may change again without a change of its timestamp, because
the clocks of file systems are coarse."""


def compute_key(dataset: DataSet, data: Data, tokenizer: PreTrainedTokenizerBase, format_name: str, cache: Path) -> str:
    """20 hexadecimal digits: a hash of the rows' bytes, the tokenizer, its chat template, and the settings that decide a sample."""
    settings = {name: getattr(data, name) for name in SETTINGS}
    inputs = {
        "format": [FORMAT, CHUNK, BLOCK_ROWS],
        "rows": _hash_rows(dataset, cache),
        "part": dataset.split,
        "shape": [format_name, dataset.fields, dataset.roles, dataset.ignore],
        "tokenizer": _hash_tokenizer(tokenizer),
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }
    if "strftime_now" in str(tokenizer.chat_template):
        inputs["today"] = date.today().isoformat()
        log.info("the chat template writes today's date, so the same rows are tokenized again every day")
    return _hash_json(inputs)[:20]


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything in a tokenizer that decides token ids: vocabulary, merges, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else _rules(backend)
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    split_special = bool(tokenizer.split_special_tokens)
    return _hash_json([type(tokenizer).__name__, rules, special, tokenizer.chat_template, split_special])


def _rules(backend: Tokenizer) -> str:
    """The rules of a tokenizer as JSON text, without the truncation and padding of its last call: every call sets them again."""
    if backend.truncation or backend.padding:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return backend.to_str()


def file_states(source: DataSet) -> list[list[Any]] | None:
    """The state of each file of a source, to notice a change. None for a Hub set, which is a fixed snapshot."""
    files = find_files(source)
    return None if files is None else [file.state() for file in files]


def _hash_rows(source: DataSet, cache: Path) -> Any:
    """[format, compression, SHA-256] of each file in order, without its name; for a Hub set the fingerprint of `datasets`.

    The SHA-256 of a file is remembered in the cache, and used again as long as the file's state is the same. Of a remote
    file, what its file system says of its content and time stands for the SHA-256, so that it is not read twice.
    """
    files = find_files(source)
    if files is None:
        return [hub.load(source)._fingerprint, source.subset, source.revision]
    memory = cache / ".hashes.json"
    known, fresh = _read_memory(memory), {}
    hashes = []
    for file in files:
        state = file.state()
        if file.filesystem is not None:
            hashes.append([file.format, file.compression, file.location, state])
            continue
        path = Path(file.path)
        name = str(path.resolve())
        is_known = known.get(name, {}).get("state") == state
        digest = known[name]["sha256"] if is_known else _sha256(path)
        settled = time.time() - max(state[1], state[2]) / 1e9 > SETTLED_S
        if settled and not is_known:
            fresh[name] = {"state": state, "sha256": digest}
        hashes.append([file.format, file.compression, digest])
    if fresh:
        with suppress(OSError):  # the cache may be read-only
            write_json(memory, _read_memory(memory) | fresh)
    return hashes


def _read_memory(memory: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return read_json(memory) or {}
    return {}


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


def _hash_json(value: Any) -> str:
    def to_json(item: Any) -> Any:
        return item.name if isinstance(item, Enum) else str(item)

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=to_json).encode()).hexdigest()
