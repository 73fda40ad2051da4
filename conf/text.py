"""Refuses texts in a config that a script, a variable, a path or a file could not hold as they are. Walks over every key."""

import unicodedata
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from conf.errors import Problem

REFUSED = ("Cc", "Zl", "Zp", "Cs")
"""Unicode's classes of characters that end a line or cannot be shown: control characters, separators, halves of characters."""
NAMES = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab", "\0": "a NUL"}
SHOWN = 60


class Text(NamedTuple):
    """A text in a config: a value, an item of a list, or a name in a dictionary."""

    key: str
    value: str
    kind: str
    """`free`: only the model, the tokenizer or a tracker sees it. `shell`: lines of the user's own shell. Empty for all others."""
    is_name: bool = False
    name: str = ""
    """The name in a dictionary that this is the value of."""


def texts(section: Any, prefix: str = "") -> Iterator[Text]:
    """Every text of a config or of a section of it."""
    for item in fields(section):
        yield from _walk(prefix + item.name, getattr(section, item.name), item.metadata.get("text", ""))


def _walk(key: str, value: Any, kind: str, name: str = "") -> Iterator[Text]:
    if is_dataclass(value):
        yield from texts(value, f"{key}.")
    elif isinstance(value, dict):
        for entry_name, entry in value.items():
            yield Text(key, str(entry_name), kind, is_name=True)
            shown = entry_name if str(entry_name).isprintable() else ascii(entry_name)
            yield from _walk(f"{key}.{shown}", entry, kind, str(entry_name))
    elif isinstance(value, list):
        for entry in value:
            yield from _walk(key, entry, kind, name)
    elif isinstance(value, str):
        yield Text(key, value, kind, name=name)


def problems(config: Any) -> Iterator[Problem]:
    """Each text that holds a character of `REFUSED`.

    A line break in a value would make the rest of it a line of the batch script, which Slurm runs. Free texts may have it, and
    shell lines may have several lines.
    """
    for text in texts(config):
        refused = ("Cs",) if text.kind == "free" else REFUSED
        kept = "\n\t" if text.kind == "shell" else ""
        found = next((sign for sign in text.value if sign not in kept and unicodedata.category(sign) in refused), None)
        if found is not None:
            name = NAMES.get(found, "a character that cannot be shown")
            shown = f"{'the name ' if text.is_name else ''}{ascii(text.value)[:SHOWN]}"
            message = (
                f"{shown} has {name} (U+{ord(found):04X}). Write it in one line, without that; in YAML without | and >"
            )
            yield Problem(text.key, None, message)
