"""Refuses texts in a config that a script, a variable, a path or a file could not hold as they are. Walks over every key."""

import unicodedata
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from conf.errors import Problem

REFUSED = ("Cc", "Zl", "Zp", "Cs")
"""Unicode's classes of characters that end a line or have no glyph: control characters, separators, halves of surrogates."""
NAMES = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab", "\0": "a NUL"}
SHOWN = 60


def problems(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Each text of a section, in values, lists and names of dictionaries, that holds a character of `REFUSED`.

    A line break in a value would make the rest of it a line of the batch script, which Slurm runs. A text that only the model
    or the tokenizer sees (`free_text` in the schema) may have it.
    """
    for item in fields(section):
        value, free = getattr(section, item.name), "free_text" in item.metadata
        yield from _walk(prefix + item.name, value, ("Cs",) if free else REFUSED)


def _walk(key: str, value: Any, refused: tuple[str, ...]) -> Iterator[Problem]:
    if is_dataclass(value):
        yield from problems(value, f"{key}.")
    elif isinstance(value, dict):
        for name, entry in value.items():
            shown = name if str(name).isprintable() else ascii(name)
            yield from _problem(key, f"the name {ascii(name)[:SHOWN]}", str(name), refused)
            yield from _walk(f"{key}.{shown}", entry, refused)
    elif isinstance(value, list):
        for entry in value:
            yield from _walk(key, entry, refused)
    elif isinstance(value, str):
        yield from _problem(key, ascii(value)[:SHOWN], value, refused)


def _problem(key: str, shown: str, text: str, refused: tuple[str, ...]) -> Iterator[Problem]:
    found = next((sign for sign in text if unicodedata.category(sign) in refused), None)
    if found is not None:
        name = NAMES.get(found, "a character that cannot be shown")
        message = (
            f"{shown} has {name} (U+{ord(found):04X}), which would end the line where it is used. Write it as one line; in YAML "
            "without | and >"
        )
        yield Problem(key, None, message)
