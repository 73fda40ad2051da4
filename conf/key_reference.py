"""What the schema says about each key: sentence, type, choices, default. `python -m conf.key_reference` writes docs/keys.md."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields
from functools import cache
from math import inf
from pathlib import Path
from textwrap import dedent
from typing import Any, get_type_hints

from omegaconf import MISSING

from conf import resolve
from conf.errors import as_typed
from conf.files import write_text
from conf.schema import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "keys.md"
ABOVE = """\
# All keys

Set any of them on the command line (`train.learning_rate=2e-5`), in an experiment or in a cluster's file.
`python launch.py --help KEY` prints what stands here about one key. A key without a default gets its value from a config group,
such as `train=standard`.

<!-- Written from conf/schema*.py by `python -m conf.key_reference`. -->
"""


@dataclass(frozen=True)
class Key:
    """One key of the schema, or one section."""

    name: str
    """With its sections: `train.learning_rate`."""
    hint: Any
    """Its type."""
    text: str
    """What it means, as one paragraph; empty if its name says it all."""
    default: str | None
    """As the user would type it; None if a config group must set it, and for a section."""
    minimum: float = -inf
    maximum: float = inf
    section: type | None = None
    """The dataclass of a section, or of the entries of a dictionary of sections."""

    @property
    def kind(self) -> str:
        """The type in plain words, with the choices or bounds."""
        words = describe_type(self.hint)
        low, high = (f"{bound:,.12g}" if abs(bound) >= 1 else f"{bound:g}" for bound in (self.minimum, self.maximum))
        if self.minimum == -inf:
            return words
        return f"{words}, at least {low}" if self.maximum == inf else f"{words}, {low} to {high}"


@cache
def keys(section: type = Config, prefix: str = "") -> dict[str, Key]:
    """Every key below a section by its dotted name, in the order of the schema. Entries of named sections are below NAME."""
    found: dict[str, Key] = {}
    hints, texts = get_type_hints(section), _texts(section)
    for item in fields(section):
        name, inner = prefix + item.name, resolve.section_of(hints[item.name])
        entry = item.metadata.get("section")
        text = texts.get(item.name) or (_class_text(inner) if inner else "")
        found[name] = Key(
            name,
            hints[item.name],
            text,
            None if inner else _default(item),
            item.metadata.get("minimum", -inf),
            item.metadata.get("maximum", inf),
            inner or entry,
        )
        if inner:
            found |= keys(inner, f"{name}.")
        elif entry:
            found |= keys(entry, f"{name}.NAME.")
    return found


def describe_type(hint: Any) -> str:
    """A type in plain words: `a whole number`, `one of a, b`, `a list of a, b: [a,b]`."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if isinstance(hint, type) and hasattr(hint, "__members__"):
        return "one of " + ", ".join(hint.__members__)
    for kind, text in words.items():
        if hint is kind:
            return text
        if str(hint) == f"{kind.__name__} | None":
            return f"{text} or null"
    if str(hint) == "int | str | None":
        return "a whole number, a string or null"
    if str(hint).startswith("list"):
        return resolve.describe_list(hint)
    if str(hint).startswith("dict"):
        return "a dictionary, for example {name: value}"
    members = getattr(hint, "__args__", (hint,))
    if inner := resolve.section_of(hint):
        return f"a section{' or null' if len(members) > 1 and inner else ''}"
    named = next((item for item in members if hasattr(item, "__members__")), None)
    return f"{describe_type(named)}, or null" if named else f"of type {getattr(hint, '__name__', hint)}"


def _default(item: "Field[Any]") -> str | None:
    value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
    if value is NO_DEFAULT or value == MISSING:
        return None
    if isinstance(value, list):
        return f"[{','.join(as_typed(entry) for entry in value)}]"
    return f"{value:g}" if isinstance(value, float) else as_typed(value)


def _texts(section: type) -> dict[str, str]:
    """The string below each field of a dataclass, as one paragraph."""
    body = ast.parse(dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts


def _class_text(section: type) -> str:
    text = section.__doc__ or ""
    return "" if text.startswith(f"{section.__name__}(") else " ".join(text.split())


def page() -> str:
    """The text of docs/keys.md."""
    known = keys()
    parts = [ABOVE, "## The run", "", *_table("", known)]
    for name, key in known.items():
        if key.section:
            title = f"{name}.NAME" if str(key.hint).startswith("dict") else name
            parts += ["", f"## {title}", "", *([_linked(key.text, name, known), ""] if key.text else [])]
            parts += _table(f"{title}.", known)
    return "\n".join(parts) + "\n"


def _table(prefix: str, known: dict[str, Key]) -> Iterator[str]:
    """A table of the keys directly below a section; sections in it have tables of their own."""
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for name, key in known.items():
        leaf = name.removeprefix(prefix)
        if not name.startswith(prefix) or "." in leaf:
            continue
        if key.section:
            link = f"{name}.NAME" if str(key.hint).startswith("dict") else name
            yield f"| [`{leaf}.`](#{_anchor(link)}) | | {_cell(key.text)} |"
            continue
        default = "" if key.default is None else f"`{key.default}`" if key.default else '`""`'
        text = _cell(_linked(key.text, name, known))
        meaning = f"{text} *({_cell(key.kind)})*" if text else f"*{_cell(key.kind)}*"
        yield f'| <a id="{name}"></a>`{leaf}` | {_cell(default)} | {meaning} |'


def _linked(text: str, own: str, known: dict[str, Key]) -> str:
    """The text with a link for each other key that it names in full."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known or name == own or "." not in name:
            return match[0]
        return f"[{match[0]}](#{_anchor(name) if known[name].section else name})"

    return re.sub(r"`([a-z_.]+)`", link, text)


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w-]", "", heading.lower())


def _cell(text: str) -> str:
    """A text for a cell of a table. Outside of code, `<` would begin an element of HTML."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


if __name__ == "__main__":
    write_text(PAGE, page())
