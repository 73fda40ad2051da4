"""Says of words of a command line that are no overrides what they are, and what to type: blanks around =, dashes before a key."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from conf.errors import Problem
from launcher.check import quoting

FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--info", "-i", "--experimental-rerun"),
)
FLAGS = (
    *(*FLAGS_WITH_VALUE, "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc"),
)
"""Those of Hydra."""
TYPOGRAPHIC = str.maketrans({
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2018\u2019\u201a\u201b", "'"),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
    **dict.fromkeys("\u00a0\u2007\u202f", " "),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff", ""),
    "\uff1d": "=",
})  # fmt: skip
"""Signs that word processors and web pages put in place of those of a keyboard."""


def problems(words: Sequence[str], known: Mapping[str, Any], instead: Callable[[str], str]) -> Iterator[Problem]:
    """Words that stand apart from their `=`, and keys that are typed as flags.

    `known` are the keys and groups; `instead(key)` says what exists in place of another key.
    """
    for first, last in _apart(words):
        together = "".join(words[first:last])
        yield Problem(" ".join(words[first:last]), None, f"has blanks around the =. Type {together}")
    for first, last in _dashed(words):
        name, _, value = words[first].lstrip("-").partition("=")
        given = value or (words[first + 1] if last > first + 1 else "VALUE")
        typed = f": {name}={given}" if name in known else f". {name}{instead(name)}"
        yield Problem(words[first].partition("=")[0], None, f"is no flag. Keys are typed without dashes{typed}")


def without_these(words: Sequence[str]) -> list[str]:
    """The words that `problems` says nothing about."""
    gone = {number for first, last in (*_apart(words), *_dashed(words)) for number in range(first, last)}
    return [word for number, word in enumerate(words) if number not in gone]


def _apart(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of the words `key = value`, `key= value` and `key =value`."""
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        after = words[number + 1] if number + 1 < len(words) else ""
        is_key = re.fullmatch(r"[a-z_]\w*(\.\w+)*", before) is not None
        has_value = bool(after) and "=" not in after and not after.startswith("-")
        if word == "=" and is_key and has_value:
            yield number - 1, number + 2
        elif word.startswith("=") and len(word) > 1 and is_key:
            yield number - 1, number + 1
        elif re.fullmatch(r"[a-z_]\w*(\.\w+)*=", word) and has_value:
            yield number, number + 2


def _dashed(words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of the words `--key=value` and `--key value`."""
    for number, word in enumerate(words):
        name = word.partition("=")[0]
        before = words[number - 1] if number else ""
        if not re.fullmatch(r"--?[A-Za-z][\w.-]*", name) or name in FLAGS or before in FLAGS_WITH_VALUE:
            continue
        after = words[number + 1] if number + 1 < len(words) else ""
        yield number, number + (2 if after and "=" not in word + after and not after.startswith("-") else 1)


def not_parsed(word: str, known: Mapping[str, Any]) -> str:
    """Why Hydra cannot read a word, and what to type."""
    key, _, value = word.partition("=")
    plain = word.translate(TYPOGRAPHIC)
    plain = bare if quoting.parses(bare := plain.translate({34: "", 39: ""})) else plain
    if word.translate(TYPOGRAPHIC) != word and quoting.parses(plain):
        sign = next(char for char in word if char.translate(TYPOGRAPHIC) != char)
        return f"has the sign {sign!r}, as word processors write it. Type {shlex.quote(plain)}"
    if word.partition(":")[0] in known and "=" not in word:
        return (
            f"has no value. Type {word.partition(':')[0]}={word.partition(':')[2] or 'VALUE'}, as for every key=value"
        )
    if "=" in word and quoting.type_of(key.lstrip("+")).startswith("dict"):
        return (
            f"is not a dictionary. Write it in quotes for the shell, '{key}={{name: value}}', with \"...\" around a name or a "
            f"value that has a comma, a colon or brackets"
        )
    if "=" in word and quoting.is_text(key.lstrip("+")) and (typed := quoting.quoted(key, value.strip("\"'"))):
        return f"has a quote that is not closed, or one too many. Type {typed}"
    return (
        "is not of the form key=value. If the value has special characters, put quotes around it, "
        "for the shell and for Hydra: 'key=\"value\"'"
    )
