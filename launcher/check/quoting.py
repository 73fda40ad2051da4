"""Reads overrides that Hydra's grammar refuses although they can mean only one thing: names and values with other letters,
blanks, dots, `=`, `,` or brackets."""

import re
import shlex
from dataclasses import fields
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from conf import resolve
from conf.columns import SPLIT
from conf.schema_model import DataSet

Entry = tuple[tuple[str, ...], Any]
"""(path of a key, its value): an override that Hydra cannot take, set in the config that it composed."""

SET_KEYS = "|".join(item.name for item in fields(DataSet))
SET = re.compile(rf"data\.sets\.(.+?)\.({SET_KEYS})(?:\.(.+))?", re.DOTALL)
"""A key of a named set: data.sets.NAME.KEY, or data.sets.NAME.KEY.ENTRY."""


def read_words(words: list[str]) -> tuple[list[str], list[Entry]]:
    """(words for Hydra, entries that Hydra cannot take). A word that stays unclear is passed on as it is."""
    kept, entries = [], list[Entry]()
    for word in words:
        found = [] if word.startswith(("-", "~", "hydra")) or "=" not in word else _entries(word)
        entries += found
        if not found:
            kept.append(_quoted_word(word) or word)
    return kept, entries


def apply(config: DictConfig, entries: list[Entry]) -> None:
    """Set these entries in a composed config."""
    with open_dict(config):
        for path, value in entries:
            node: Any = config
            for name in path[:-1]:
                if OmegaConf.is_missing(node, name) or node.get(name) is None:
                    node[name] = {}
                node = node[name]
            node[path[-1]] = value


def quoted(key: str, value: str) -> str | None:
    """The word `key="value"` as it is typed in a shell, if Hydra then reads exactly this value."""
    word = _with_quotes(key, value)
    return word and shlex.quote(word)


def type_of(key: str) -> str:
    """The type of a key in words of Python, also of a key in a named set; "" for other keys."""
    if match := SET.fullmatch(key):
        return str(get_type_hints(DataSet)[match[2]]) if match[3] is None else "<class 'str'>"
    return str(resolve.keys().get(key, ""))


def is_text(key: str) -> bool:
    """Whether the value of a key is text, so that any value can be meant as it is written."""
    return type_of(key) in ("<class 'str'>", "str | None")


def _entries(word: str) -> list[Entry]:
    """The entries of a word for a dictionary (data.roles, data.fields) or a named set, if Hydra misreads the word."""
    key, _, value = word.lstrip("+").partition("=")
    parsed = parses(word)
    for path, of_texts in _dictionaries(key).items():
        prefix = ".".join(path)
        if key == prefix and value.strip().startswith("{") and not parsed:
            pairs = split_items(value, "{}")
            items = [_split_pair(item) for item in pairs or []]
            if items and all(items):
                return [((*path, item[0]), item[1]) for item in items if item]
        name = key.removeprefix(f"{prefix}.")
        if name != key and (not parsed or (of_texts and "." in name)):
            text = _value(value)
            return [] if text is None else [((*path, _unquoted(name) or name), text)]
    match = SET.fullmatch(key)
    if match and not parsed and not parses(f"{key}=x") and match[3] is None and type_of(key):
        text = _value(value)
        return [] if text is None else [(("data", "sets", match[1], match[2]), text)]
    return []


def _dictionaries(key: str) -> dict[tuple[str, ...], bool]:
    """The paths of the dictionaries that a key may lie in, and whether all their values are texts."""
    named = resolve.named_sections()
    hints = {
        name: str(hint) for name, hint in resolve.keys().items() if str(hint).startswith("dict") and name not in named
    }
    found = {tuple(name.split(".")): hint.startswith("dict[str, str") for name, hint in hints.items()}
    if match := SET.fullmatch(key):
        found |= {("data", "sets", match[1], name): True for name in ("fields", "roles")}
    return found


def _value(text: str) -> Any:
    """A value by Hydra's grammar, or else the text itself; None if it is a quotation that does not end."""
    if parses(f"x={text}"):
        return OverridesParser.create().parse_override(f"x={text}").value()
    return None if text[:1] in ("'", '"', "{", "[") and not text.startswith(("{{", "{%")) else text


def _quoted_word(word: str) -> str | None:
    """The word in the form that Hydra reads, if it is a text or a list of texts without the quotes that Hydra wants."""
    key, _, value = word.partition("=")
    if word.startswith(("-", "~", "hydra")) or "=" not in word:
        return None
    if SPLIT.fullmatch(value) and is_text(key.lstrip("+")):
        return _with_quotes(key, value)  # Hydra takes [10%:] for a list
    if parses(word) or "${" in value:
        return None
    if is_text(key.lstrip("+")) and value[:1] not in ("'", '"'):
        return _with_quotes(key, value)
    if type_of(key.lstrip("+")) == "list[str]" and (items := split_items(value, "[]")):
        texts = [_unquoted(item) if item[:1] in ("'", '"') else item for item in items]
        if None not in texts:
            joined = f"{key}=[{','.join(_quotes(str(text)) for text in texts)}]"
            return joined if parses(joined) else None
    return None


def parses(word: str) -> bool:
    """Whether Hydra's grammar accepts the word."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _quotes(text: str) -> str:
    """The text in quotes of Hydra: a backslash counts only before a quote."""
    return '"' + re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text) + '"'


def _with_quotes(key: str, value: str) -> str | None:
    word = f"{key}={_quotes(value)}"
    same = parses(word) and OverridesParser.create().parse_override(word).value() == value
    return word if same else None


def split_items(text: str, brackets: str) -> list[str] | None:
    """The items of `{a, b}` or `[a, b]`, split at commas outside quotes; None if there are no such brackets, or inner ones."""
    text = text.strip()
    if len(text) < 2 or (text[0], text[-1]) != tuple(brackets):
        return None
    pattern = r"""\s*((?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,'"{}\[\]])+)\s*(?:,|$)"""
    items, position, inner = list[str](), 0, text[1:-1]
    while position < len(inner):
        match = re.compile(pattern).match(inner, position)
        if match is None:
            return None
        items.append(match[1].strip())
        position = match.end()
    return items


def _split_pair(item: str) -> tuple[str, Any] | None:
    """(name, value) of `name: value`, both with or without quotes."""
    match = re.fullmatch(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^:'"]+?)\s*:\s*(.*)""", item, re.DOTALL)
    if match is None:
        return None
    name = _unquoted(match[1]) if match[1][0] in "'\"" else match[1]
    value = _value(match[2])
    return None if not name or value is None else (name, value)


def _unquoted(text: str) -> str | None:
    """What stands between quotes; None if the text is not in quotes."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    return text[1:-1].replace(f"\\{text[0]}", text[0])
