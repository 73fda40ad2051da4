"""Reads an entry of LLaMA-Factory's dataset_info.json as a data set: its file or Hub id, its columns and its tags."""

import json
from pathlib import Path
from typing import Any

from conf.choices import Format
from conf.columns import SPLIT
from conf.errors import DataError, Problem
from conf.schema_model import DataSet

FILE_NAME = "dataset_info.json"
FORMATS = {"alpaca": Format.alpaca, "sharegpt": Format.sharegpt, "openai": Format.messages}
SOURCES = ("file_name", "cloud_file_name", "hf_hub_url")
OTHER_SOURCES = ("ms_hub_url", "om_hub_url", "script_url")
"""Sources that Muster does not read; LLaMA-Factory does not read them either where there is a `hf_hub_url`."""
KEYS = (
    *SOURCES,
    *OTHER_SOURCES,
    "formatting",
    "subset",
    "revision",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
)
IGNORED_KEYS = ("ranking", "file_sha1", "description")
"""`ranking` is refused if it is true."""
CHAT_COLUMNS = {"messages": "messages", "system": "system", "tools": "tools"}
"""LLaMA-Factory's name of a column and Muster's."""
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
ALPACA_COLUMNS |= {"system": "system", "tools": "tools"}
OPTIONAL = ("input", "history", "system", "tools")
"""Columns that rows may lack."""
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
REFUSED_COLUMNS = {
    **dict.fromkeys(("images", "videos", "audios"), "is not text, and only text is supported"),
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), "marks preference data, which is not supported"),
}
FIELD_TAGS = {"role_tag": "role", "content_tag": "content"}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}


def split_path(path: str) -> tuple[str, str | None] | None:
    """(file, name of an entry or None) of FOLDER/dataset_info.json or FOLDER/dataset_info.json:NAME; None for other paths."""
    file, separator, name = path.rpartition(f"{FILE_NAME}:")
    if separator and name:
        return file + FILE_NAME, name
    return (path, None) if path == FILE_NAME or path.endswith(f"/{FILE_NAME}") else None


def expand(data_set: DataSet, key: str) -> DataSet:
    """The set that an entry describes, if the path of `data_set` is a dataset_info.json; else `data_set` itself.

    The entry is the one that `subset` names, or the only one. What `data_set` itself says wins over the entry. `key` is
    the config key of the path. Raises DataError for an entry that cannot be read as it is.
    """
    found = split_path(data_set.path)
    if found is None or not Path(found[0]).expanduser().is_file():
        return data_set
    file = Path(found[0]).expanduser()
    name, entry = _entry(file, found[1] or data_set.subset, key)
    problem = _Refusal(key, f"{file}:{name}")
    _check(entry, problem)
    format = FORMATS[entry.get("formatting", "alpaca")]
    fields, ignored = _fields(entry, format)
    if "text" in fields:
        format = Format.text
    tags = entry.get("tags") or {}
    roles = {str(tags[tag]): role for tag, role in ROLE_TAGS.items() if tags.get(tag) not in (None, role)}
    fields |= {field: str(tags[tag]) for tag, field in FIELD_TAGS.items() if tags.get(tag)}
    split, rows = _split(entry, problem)
    return DataSet(
        path=_path(file, entry, split),
        subset=entry.get("subset") if "hf_hub_url" in entry else None,
        revision=data_set.revision or (entry.get("revision") if "hf_hub_url" in entry else None),
        files=data_set.files or ([f"{entry['folder'].strip('/')}/**"] if entry.get("folder") else []),
        split=data_set.split or rows,
        format=format if data_set.format in (None, Format.auto) else data_set.format,
        fields=fields | data_set.fields,
        roles=roles | data_set.roles,
        ignore=data_set.ignore or ignored,
        weight=data_set.weight,
        num_samples=data_set.num_samples or entry.get("num_samples"),
    )


class _Refusal:
    """Makes the error for an entry."""

    def __init__(self, key: str, entry: str) -> None:
        self._key, self._entry = key, entry

    def __call__(self, message: str) -> DataError:
        return DataError(Problem(self._key, self._entry, message))


def _entry(file: Path, name: str | None, key: str) -> tuple[str, dict[str, Any]]:
    """(name, entry) of the entry that is meant."""
    problem = _Refusal(key, str(file))
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise problem(f"cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict) or not any(_is_entry(item) for item in entries.values()):
        raise problem(
            f"is not LLaMA-Factory's list of sets: no entry has {', '.join(SOURCES)}. For rows, give their file or folder"
        )
    if name is None and len(entries) == 1:
        name = next(iter(entries))
    if name is None or name not in entries:
        wrong = "has several sets" if name is None else f"has no set {name}"
        subset = f"{key.removesuffix('path')}subset" if key.endswith(".path") else None
        remedy = f"{subset}={next(iter(entries))}" if subset else f"{key}={file}:{next(iter(entries))}"
        raise problem(f"{wrong}: choose one of {', '.join(entries)}, for example {remedy}")
    return name, entries[name]


def _is_entry(item: object) -> bool:
    return isinstance(item, dict) and any(key in item for key in (*SOURCES, *OTHER_SOURCES))


def _check(entry: Any, problem: _Refusal) -> None:
    """Raise DataError for what Muster does not do, or does not know."""
    if not _is_entry(entry):
        raise problem(f"names no source: give one of {', '.join(SOURCES)}")
    if not any(entry.get(key) for key in SOURCES):
        other = next(key for key in OTHER_SOURCES if key in entry)
        raise problem(f"{other} is not supported: give file_name or hf_hub_url instead")
    if entry.get("ranking"):
        raise problem("ranking marks preference data, which is not supported: choose another set")
    if unknown := [name for name in entry if name not in (*KEYS, *IGNORED_KEYS) and not name.startswith("_")]:
        raise problem(f"the key {unknown[0]} is unknown: remove it, or write the rows in another format")
    if (formatting := entry.get("formatting", "alpaca")) not in FORMATS:
        raise problem(f"formatting {formatting} is unknown: use one of {', '.join(FORMATS)}")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for column in columns:
        if column in REFUSED_COLUMNS:
            raise problem(f"the column {column} {REFUSED_COLUMNS[column]}: choose another set")
        if column not in CHAT_COLUMNS and column not in ALPACA_COLUMNS:
            raise problem(f"the column {column} is unknown: use {', '.join({**ALPACA_COLUMNS, **CHAT_COLUMNS})}")
    if unknown := [tag for tag in tags if tag not in FIELD_TAGS and tag not in ROLE_TAGS]:
        raise problem(f"the tag {unknown[0]} is unknown: use {', '.join((*FIELD_TAGS, *ROLE_TAGS))}")


def _fields(entry: dict[str, Any], format: Format) -> tuple[dict[str, str], list[str]]:
    """(`fields`, `ignore`): where LLaMA-Factory reads the columns of the format, and which of them it does not read."""
    columns = {name: column for name, column in (entry.get("columns") or {}).items() if column}
    if format is Format.alpaca and "columns" in entry and set(columns) == {"prompt"}:
        return {"text": columns["prompt"]}, []  # a set for pretraining
    if format is Format.alpaca:
        names, defaults = ALPACA_COLUMNS, DEFAULT_COLUMNS
    else:
        names, defaults = CHAT_COLUMNS, {"messages": "conversations"}
    read = columns if "columns" in entry else defaults
    if format is not Format.alpaca:
        read = defaults | columns
    fields = {names[name]: column for name, column in read.items() if name in names}
    ignored = [column for column in names.values() if column not in fields and column not in fields.values()]
    if fields == {names[name]: column for name, column in DEFAULT_COLUMNS.items() if name in names}:
        fields = {}  # Muster's own names, so that `input` stays optional
    fields = {name: column + "?" * (name in OPTIONAL) for name, column in fields.items()}
    return fields, ignored


def _split(entry: dict[str, Any], problem: _Refusal) -> tuple[str, str | None]:
    """(split, range of rows or None) of `train[:100]`."""
    name, bracket, rest = str(entry.get("split") or "train").partition("[")
    rows = bracket + rest or None
    if rows is not None and not SPLIT.fullmatch(rows):
        raise problem(f"split {entry['split']} is not understood: write train or train[:1000]")
    if name != "train" and "hf_hub_url" not in entry:
        raise problem(f"split {name} is only possible with hf_hub_url: name the file of these rows")
    return name, rows


def _path(file: Path, entry: dict[str, Any], split: str) -> str:
    if "hf_hub_url" in entry:
        return str(entry["hf_hub_url"]) + (f":{split}" if split != "train" else "")
    return str(entry["cloud_file_name"] if "cloud_file_name" in entry else file.parent / entry["file_name"])
