"""Names a tokenised set by everything that its tokens depend on, so that it is made once and never stale."""

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

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from conf.files import read_json, write_json
from conf.schema import Data, DataSet
from jobs.data import sources

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the files of a set; raise it when the same rows would become other files."""
SETTLED_S = 10.0
"""A file younger than this may be written to again within one tick of its clock, so its hash is not remembered."""


def key(one: DataSet, data: Data, words: PreTrainedTokenizerBase, shape: str, cache: Path) -> str:
    """20 hexadecimal digits: of the rows' bytes, the tokenizer, its template, and the settings that shape a sample."""
    settings = {name: getattr(data, name) for name in ("mask", "max_length", "overlong", "max_rows")}
    described = {
        "format": [FORMAT, sources.CHUNK, sources.ROWS],
        "rows": _content(one.path, cache),
        "part": one.split,
        "shape": [shape, one.fields, one.roles],
        "tokenizer": tokenizer(words),
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")},
    }
    if "strftime_now" in str(words.chat_template):
        described["today"] = date.today().isoformat()
        log.info("the chat template writes today's date: the same rows are tokenised anew every day")
    return _digest(described)[:20]


def tokenizer(words: PreTrainedTokenizerBase) -> str:
    """Of everything in a tokenizer that decides ids: its merges and rules, its named tokens, its template."""
    backend = getattr(words, "backend_tokenizer", None)
    rules = words.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        rules |= {"truncation": None, "padding": None}  # left behind by its last use, and set anew at each
    named = {name: token for name, token in words.special_tokens_map.items() if name != "pad_token"}
    return _digest([type(words).__name__, rules, named, words.chat_template, bool(words.split_special_tokens)])


def states(path: str) -> Any:
    """What changes with the files of a source: size, times and inode of each; of a Hub set nothing, for it is a snapshot."""
    files = sources.files(path)
    return None if files is None else [_state(file) for file in files]


def _state(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _content(path: str, cache: Path) -> Any:
    """The hash and kind of each file by its order, whatever it is called; of a Hub set, the fingerprint `datasets` keeps.

    A hash is remembered for as long as a file's state stays.
    """
    files = sources.files(path)
    if files is None:
        return sources.hub(path)._fingerprint
    memory, found = cache / ".hashes.json", []
    known = _remembered(memory)
    fresh = {}
    for file in files:
        name, state = str(file.resolve()), _state(file)
        digest = known[name]["sha256"] if known.get(name, {}).get("state") == state else _sha256(file)
        settled = time.time() - max(state[1], state[2]) / 1e9 > SETTLED_S
        if settled and known.get(name, {}).get("state") != state:
            fresh[name] = {"state": state, "sha256": digest}
        found.append([sources.kind(file), file.suffix if file.suffix in sources.OPENERS else "", digest])
    if fresh:
        with suppress(OSError):  # a cache that may only be read
            write_json(memory, _remembered(memory) | fresh)
    return found


def _remembered(memory: Path) -> dict[str, Any]:
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


def _digest(value: Any) -> str:
    def plain(item: Any) -> Any:
        return item.name if isinstance(item, Enum) else str(item)

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()
