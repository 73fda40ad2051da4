"""The data sets of an Axolotl file: their type, columns and roles."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conf.columns import MESSAGE_KEYS
from launcher.convert.keys import Outcome, Row, described

TEMPLATES = {
    **{name: {"data.chat_template": name} for name in ("chatml", "gemma", "llama3")},
    "tokenizer_default": {},
    **dict.fromkeys(("mistral_v1", "mistral_v2v3", "mistral_v3_tekken"), {"data.chat_template": "mistral"}),
    **dict.fromkeys(("qwen_25", "qwen2_5"), {"data.chat_template": "qwen"}),
}
TEMPLATE = "leave it away for the tokenizer's own template, or give a Jinja file as data.chat_template"

FORMATS: dict[str, dict[str, Any]] = {
    "chat_template": {},
    "sharegpt": {"format": "sharegpt"},
    "completion": {"format": "text"},
    "input_output": {"format": "segments"},
    **{
        name: {"format": "alpaca"}
        for name in ("alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "gpteacher")
    },
    "oasst": {"format": "alpaca"},
}
"""Axolotl's `type` -> keys of Muster's data set."""
ENDS = ("turn", "all", "last", "none")
PROMPTED = ("alpaca", "alpaca_instruct", "gpteacher", "alpaca_w_system")
"""Types whose questions Axolotl writes as `### Instruction:`."""


@described("`data.path`, or `data.sets`")
def datasets(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """The training sets: one becomes `data.path`, several become `data.sets`."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return Row(key, value, Outcome.refused, why="must be a list of sets with path and type")
    sets, lost = [], []
    for item in value:
        ours, missing = _one_set(item)
        sets.append(ours)
        lost += missing
    ours = _named(sets)
    ours |= _shared(value)
    why = "; ".join(dict.fromkeys(lost))
    if any(str(item.get("type")).split(".")[0].split(":")[0] in PROMPTED for item in value):
        why = "; ".join(filter(None, [why, "questions are written by the chat template, not as `### Instruction:`"]))
    if any("refused" in note for note in lost):
        return Row(key, f"{len(value)} sets", Outcome.refused, why=why.replace("refused ", ""))
    return Row(key, f"{len(value)} sets", Outcome.changed if why else Outcome.kept, ours, why)


def _named(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys of `data` for one set, or of `data.sets` for several."""
    if len(sets) == 1:
        return {
            "/data": "jsonl",
            **{f"data.{name}": item for name, item in sets[0].items()},
            "data.name": _name(sets[0], 0, set()),
        }
    taken: set[str] = set()
    return {"/data": "mix", "data.sets": {_name(item, number, taken): item for number, item in enumerate(sets)}}


def _name(data_set: Mapping[str, Any], number: int, taken: set[str]) -> str:
    """A short name for a set, from its path."""
    last = Path(str(data_set["path"])).name.split(".")[0]
    name = re.sub(r"\W+", "_", last).strip("_") or f"set{number}"
    name = f"{name}{number}" if name in taken else name
    taken.add(name)
    return name


def _one_set(item: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(Muster's keys of a set, notes about what differs or is refused)."""
    ours: dict[str, Any] = {"path": item.get("path")}
    notes = []
    kind = item.get("type", "chat_template")
    base = str(kind).split(":")[0].split(".")[0]
    if isinstance(kind, dict):
        ours |= {"format": "prompt_completion", "fields": _prompt_fields(kind)}
    elif base in FORMATS:
        ours |= FORMATS[base]
    else:
        notes.append(
            f"refused type {kind}: Muster reads alpaca, sharegpt, messages, prompt_completion, segments and text"
        )
    for theirs, name in (("name", "subset"), ("revision", "revision")):
        if item.get(theirs) is not None:
            ours[name] = item[theirs]
    if files := item.get("data_files"):
        ours["files"] = files if isinstance(files, list) else [files]
    split = str(item.get("split") or "train")
    if split != "train":
        ours["path"] = f"{ours['path']}:{split}"
    fields = dict(_fields(item))
    if fields:
        ours["fields"] = {**ours.get("fields", {}), **fields}
    if roles := item.get("roles"):
        ours["roles"] = {theirs: role for role, names in roles.items() for theirs in names}
    return ours, [*notes, *_not_read(item)]


def _not_read(item: Mapping[str, Any]) -> Iterator[str]:
    """A note for each key of a set, and each value, that Muster does not have."""
    known = {
        "path", "type", "name", "revision", "data_files", "split", "roles", "ds_type", "field", "field_messages", "conversation",
        "message_field_role", "message_field_content", "message_property_mappings", "field_tools", "field_system", "roles_to_train",
        "train_on_eos", "train_on_eot", "chat_template", "trust_remote_code", "split_thinking", "field_instruction", "field_input",
        "field_output", "message_field_training", "message_field_training_detail", "shards",
    }  # fmt: skip
    for name in sorted(set(item) - known):
        yield f"refused key {name} of a set: look for it in docs/data.md"
    for name in item.get("message_property_mappings") or {}:
        if not _group_of(name):
            yield f"refused property {name} of a message: look for it in docs/data.md"
    for key in ("train_on_eos", "train_on_eot"):
        if item.get(key) is not None and item[key] not in ENDS:
            yield f"refused {key}: {item[key]}: Muster has data.train_on_end=turn, all, last and none"
    if item.get("shards"):
        yield f"refused shards: write data.split='[:{100 // int(item['shards'])}%]'"


def _fields(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Muster's `fields` of a set: the format's column to the user's."""
    mapped = dict(item.get("message_property_mappings") or {})
    if field := item.get("field"):
        yield "text", field
    if field := item.get("field_messages"):
        yield "messages", field
    if field := item.get("field_tools"):
        yield "tools", field
    role = mapped.get("role") or item.get("message_field_role")
    content = mapped.get("content") or item.get("message_field_content")
    for name, column in (("role", role), ("content", content)):
        if column and column != name:
            yield name, column
    trained = {"train": "message_field_training", "train_detail": "message_field_training_detail"}
    others = {name: item.get(key) for name, key in trained.items()} | mapped
    for name, column in others.items():
        if name not in ("role", "content") and column and column not in _group_of(name):
            yield name, f"{column}?"  # most messages have none
    for name in ("instruction", "input", "output", "system"):
        if column := item.get(f"field_{name}"):
            yield name, column


def _group_of(name: str) -> tuple[str, ...]:
    """The keys of a message that are read like this one; none for a name that Muster does not know."""
    return next((group for group in MESSAGE_KEYS if name in group), ())


def _prompt_fields(kind: Mapping[str, Any]) -> dict[str, str]:
    """A `type` with a `format` of its own: a Jinja template of the prompt, and the column of the answer."""
    columns = {name: str(kind.get(f"field_{name}") or name) for name in ("system", "instruction", "input", "output")}

    def template(text: str) -> str:
        for name, column in columns.items():
            text = text.replace("{" + name + "}", "{{ " + column + " }}")
        return text

    plain = template(str(kind.get("no_input_format") or kind.get("format") or "{instruction}"))
    full = template(str(kind.get("format") or "{instruction}"))
    prompt = (
        plain if plain == full else "{% if " + columns["input"] + " %}" + full + "{% else %}" + plain + "{% endif %}"
    )
    return {"prompt": prompt, "completion": columns["output"]}


def _shared(sets: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Keys that Axolotl sets for each data set and Muster for all of them."""
    ours: dict[str, Any] = {}
    for item in sets:
        if roles := item.get("roles_to_train"):
            ours["data.train_on"] = [{"gpt": "assistant", "human": "user"}.get(role, role) for role in roles]
        if (end := item.get("train_on_eos") or item.get("train_on_eot")) in ENDS:
            ours["data.train_on_end"] = str(end)
        if item.get("split_thinking"):
            ours["data.split_thinking"] = True
        if (name := item.get("chat_template")) in TEMPLATES:
            ours |= TEMPLATES[str(name)]
    return ours


@described("`data.validation_path`")
def test_datasets(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if not isinstance(value, list) or len(value) != 1:
        return Row(key, value, Outcome.refused, why="Muster has one data.validation_path. Join the sets into one file")
    ours, notes = _one_set(value[0])
    if refusal := next((note for note in notes if note.startswith("refused")), None):
        return Row(key, value, Outcome.refused, why=refusal.removeprefix("refused "))
    return Row(
        key, "1 set", Outcome.changed, {"data.validation_path": ours["path"]}, "in the format of the training set"
    )
