"""Reads each key of a data set in an Axolotl file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conf.columns import MESSAGE_KEYS, SPLIT
from launcher.convert import axolotl_prompts
from launcher.convert.keys import Outcome

TEMPLATES = {
    **{name: {"data.chat_template": name} for name in ("chatml", "gemma", "llama3")},
    "tokenizer_default": {},
    **dict.fromkeys(("mistral_v1", "mistral_v2v3", "mistral_v3_tekken"), {"data.chat_template": "mistral"}),
    **dict.fromkeys(("qwen_25", "qwen2_5"), {"data.chat_template": "qwen"}),
}
"""Axolotl's chat templates that Muster has too."""
OWN_TEMPLATE = "the tokenizer's own chat template is used. If it has none: data.chat_template=FILE.jinja"
FORMATS: dict[str, dict[str, Any]] = {
    "chat_template": {},
    "messages": {},
    "sharegpt": {"format": "sharegpt"},
    "completion": {"format": "text"},
    "pretrain": {"format": "text"},
    "input_output": {"format": "segments"},
    "tokenized": {"format": "tokenised"},
}
"""Axolotl's `type` -> keys of Muster's data set; types that write a prompt are in `axolotl_prompts`."""
ENDS = ("turn", "all", "last", "none")
LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""Words that Axolotl accepts as a path beside `data_files`."""


@dataclass
class Found:
    """One data set while its keys are read."""

    item: Mapping[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    """Keys that Axolotl sets for each data set and Muster for all of them."""


Answer = tuple[Outcome, str]
KEPT: Answer = (Outcome.kept, "")
Read = Callable[[Found, Any], Answer]


def _with(name: str) -> Read:
    def read(found: Found, value: Any) -> Answer:
        found.ours[name] = value
        return KEPT

    return read


def _column(name: str) -> Read:
    """A column, or a key of a message, under another name."""

    def read(found: Found, value: Any) -> Answer:
        group = group_of(name)
        of_turn = name in ("role", "content")
        if value != name and (of_turn or value not in group):
            found.fields[name] = f"{value}?" if group and not of_turn else str(value)
        return KEPT

    return read


def _fixed(outcome: Outcome, why: str) -> Read:
    """A key that is not read; a value that asks for nothing is not needed."""
    return lambda _, value: (
        (outcome, why) if value not in (None, False, "", 0) else (Outcome.unneeded, "asks for nothing")
    )


def _path(found: Found, value: Any) -> Answer:
    files = found.item.get("data_files")
    if value in LOADERS and files:
        found.ours["path"] = files[0] if isinstance(files, list) else files
        if isinstance(files, list) and len(files) > 1:
            found.ours |= {"path": ".", "files": files}
        return Outcome.kept, ""
    found.ours.setdefault("path", str(value))
    return KEPT


def _files(found: Found, value: Any) -> Answer:
    if found.item.get("path") not in LOADERS:
        found.ours["files"] = value if isinstance(value, list) else [value]
    return KEPT


def _split(found: Found, value: Any) -> Answer:
    name, bracket, rest = str(value or "train").partition("[")
    rows = bracket + rest
    if rows and not SPLIT.fullmatch(rows):
        return Outcome.refused, "Muster has data.split='[:1000]' or '[10%:20%]'"
    if rows:
        found.ours["split"] = rows
    if name != "train":
        found.ours["path"] = f"{found.item.get('path')}:{name}"
    return KEPT


def kind(found: Found, value: Any) -> Answer:
    if isinstance(value, Mapping):
        found.ours["format"] = "prompt_completion"
        found.fields |= axolotl_prompts.user_defined(value)
        return Outcome.kept, "as a template of the row"
    if prompt := axolotl_prompts.of_type(str(value)):
        found.ours["format"] = "prompt_completion"
        found.fields |= prompt
        return Outcome.kept, "the prompt of this type, as a template of the row"
    base = re.split(r"[:.]", str(value))[0]
    if base not in FORMATS:
        why = "Muster has no such type and recognizes the format by the columns. Write others with data.fields: docs/data.md"
        return Outcome.refused, why
    found.ours |= FORMATS[base]
    if base == "completion":
        found.shared["data.overlong"] = "split"
        return Outcome.kept, "with data.overlong=split, if all sets are of this type"
    return KEPT


def _template(found: Found, value: Any) -> Answer:
    outcome, ours, why = template_of(value)
    found.shared |= ours
    return outcome, why


def template_of(value: Any) -> tuple[Outcome, dict[str, Any], str]:
    """(outcome, Muster's keys, reason) for the name of a chat template of Axolotl."""
    name = str(value).removeprefix("tokenizer_default_fallback_")
    if name == "jinja":
        return Outcome.unneeded, {}, "chat_template_jinja is the template"
    if str(value) != name:
        return Outcome.changed, {}, OWN_TEMPLATE
    if name in TEMPLATES:
        return Outcome.kept, TEMPLATES[name], ""
    return Outcome.changed, {}, OWN_TEMPLATE


def _jinja(found: Found, value: Any) -> Answer:
    found.shared["data.chat_template"] = str(value)
    return KEPT


def _shards(found: Found, value: Any) -> Answer:
    if int(value) > 1:
        found.ours["weight"] = round(1 / int(value), 6)
    return Outcome.changed, "another random part of the rows, of the same size"


def _roles(found: Found, value: Any) -> Answer:
    found.ours["roles"] = {str(theirs): str(role) for role, names in dict(value).items() for theirs in names}
    return KEPT


def _trained(found: Found, value: Any) -> Answer:
    found.shared["data.train_on"] = [{"gpt": "assistant", "human": "user"}.get(role, role) for role in value]
    return KEPT


def _end(found: Found, value: Any) -> Answer:
    if value not in ENDS:
        return Outcome.refused, f"{value}: Muster has data.train_on_end=turn, all, last and none"
    found.shared.setdefault("data.train_on_end", value)
    return KEPT


def _thoughts(found: Found, value: Any) -> Answer:
    if value:
        found.shared["data.split_thinking"] = True
    return KEPT


def named_property(name: str) -> Read:
    if name in ("role", "content") or group_of(name):
        return _column(name)
    return _fixed(Outcome.refused, f"property {name} of a message: look for it in docs/data.md")


EXTENSION = _fixed(Outcome.unneeded, "the ending of the file says it")
UNUSED = _fixed(Outcome.unneeded, "has no effect on what is trained")
READERS: dict[str, Read] = {
    "path": _path,
    "type": kind,
    "name": _with("subset"),
    "revision": _with("revision"),
    "data_files": _files,
    "split": _split,
    "ds_type": EXTENSION,
    "shards": _shards,
    "shards_idx": _fixed(Outcome.changed, "another random part of the rows, of the same size"),
    "preprocess_shards": UNUSED,
    "trust_remote_code": _fixed(Outcome.unneeded, "Muster never runs the code of a data set"),
    "conversation": _template,
    "chat_template": _template,
    "chat_template_jinja": _jinja,
    "field": _column("text"),
    "text_column": _column("text"),
    "field_messages": _column("messages"),
    "field_tools": _column("tools"),
    "field_system": _column("system"),
    "field_instruction": _column("instruction"),
    "field_input": _column("input"),
    "field_output": _column("output"),
    "field_thinking": _column("reasoning_content"),
    "template_thinking_key": _fixed(Outcome.unneeded, "thoughts are given as reasoning_content and as thinking"),
    "message_field_role": _column("role"),
    "message_field_content": _column("content"),
    "message_field_training": _column("train"),
    "message_field_training_detail": _column("train_detail"),
    "roles": _roles,
    "roles_to_train": _trained,
    "train_on_eos": _end,
    "train_on_eot": _end,
    "split_thinking": _thoughts,
    "drop_system_message": _fixed(Outcome.refused, "take the system turns out of the rows"),
    "input_transform": _fixed(Outcome.refused, "write the rows as they are trained"),
    "input_format": _fixed(Outcome.refused, "write the rows as they are trained"),
    "field_human": _fixed(Outcome.refused, "name the speakers in data.roles"),
    "field_model": _fixed(Outcome.refused, "name the speakers in data.roles"),
    "skip": _fixed(Outcome.refused, "write data.split='[N:]'"),
}
"""A key of a data set -> the function that reads it."""


def group_of(name: str) -> tuple[str, ...]:
    """The keys of a message that are read like this one; none for a name that Muster does not know."""
    return next((group for group in MESSAGE_KEYS if name in group), ())


def unknown(_: Found, value: Any) -> Answer:
    return Outcome.refused, "unknown key of a set: look for it in docs/data.md"
