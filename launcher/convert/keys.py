"""What becomes of one key of a foreign config: the rules from which the tables of each program are made."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any


class Outcome(Enum):
    kept = "kept"
    """Muster has the same setting."""
    changed = "changed"
    """Muster has a setting that comes near; the reason says what differs."""
    unneeded = "not needed"
    """Muster does this anyway, or the key has no effect on what is trained."""
    refused = "refused"
    """Muster cannot do it; the reason says what to do instead."""


@dataclass(frozen=True)
class Row:
    """One line of the table that `muster import` prints."""

    key: str
    value: Any
    outcome: Outcome
    ours: Mapping[str, Any] = field(default_factory=dict)
    """Muster's keys and their values. A key that begins with `/` chooses an option of a config group."""
    why: str = ""
    parts: tuple["Row", ...] = ()
    """The rows of the keys inside of a section or a list; the row itself then has their values for Muster."""
    ends: bool = False
    """Refused, and without it the training is another one: nothing is written."""

    def leaves(self) -> Iterator["Row"]:
        """The rows of the keys that have no keys of their own."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


UNKNOWN = "unknown: look for it in docs/coming-from.md"
Decide = Callable[[str, Any, Mapping[str, Any]], Row]
"""Called with a key, its value, and the whole foreign config."""


@dataclass(frozen=True)
class Rule:
    """What becomes of one key."""

    decide: Decide
    description: str
    """For the reader of docs/coming-from.md: Muster's key, or why there is none."""

    def __call__(self, key: str, value: Any, config: Mapping[str, Any]) -> Row:
        return self.decide(key, value, config)


def described(text: str) -> Callable[[Decide], Rule]:
    """Makes a rule of a function."""
    return lambda decide: Rule(decide, text)


def kept(ours: str) -> Rule:
    """The same value under Muster's key."""
    return Rule(lambda key, value, _: Row(key, value, Outcome.kept, {ours: value}), f"`{ours}`")


def number(ours: str) -> Rule:
    """A number under Muster's key. YAML reads `1e-4` as text."""

    @described(f"`{ours}`")
    def rule(key: str, value: Any, _: Mapping[str, Any]) -> Row:
        try:
            return Row(key, value, Outcome.kept, {ours: float(value)})
        except (TypeError, ValueError):
            return Row(key, value, Outcome.refused, why="is not a number")

    return rule


def choice(options: Mapping[Any, Mapping[str, Any]], otherwise: str, *, last: bool = False) -> Rule:
    """One of the values in `options`, each with Muster's keys. Any other value is refused with `otherwise`, and with `last` it
    ends the import."""
    ours = dict.fromkeys(f"`{key.lstrip('/')}`" for option in options.values() for key in option)

    @described(", ".join(ours) or otherwise)
    def rule(key: str, value: Any, _: Mapping[str, Any]) -> Row:
        name = str(value).lower()
        if name not in options:
            return Row(key, value, Outcome.refused, why=otherwise, ends=last)
        return Row(key, value, Outcome.kept, options[name])

    return rule


def changed(
    ours: str, why: str, *, make: Callable[[Any], Any] = lambda value: value, also: Mapping[str, Any] | None = None
) -> Rule:
    """`make` of the value under Muster's key, and the keys in `also`, which come near; `why` says what differs."""
    return Rule(
        lambda key, value, _: Row(key, value, Outcome.changed, {**(also or {}), ours: make(value)}, why),
        f"`{ours}`: {why}",
    )


def unneeded(why: str) -> Rule:
    return Rule(lambda key, value, _: Row(key, value, Outcome.unneeded, why=why), f"not needed: {why}")


def refused(instead: str) -> Rule:
    """Refused where the key is set; `false`, `none` and 0 ask for nothing."""

    @described(f"refused: {instead}")
    def rule(key: str, value: Any, _: Mapping[str, Any]) -> Row:
        if value in (False, 0, "", "none", "None", "false", "False") or value == [] or value == {}:
            return Row(key, value, Outcome.unneeded, why="asks for nothing")
        return Row(key, value, Outcome.refused, why=instead)

    return rule


def ends(instead: str) -> Rule:
    """Refused as by `refused`, and the import ends: what the file trains is not a fine-tuning on texts."""
    rule = refused(instead)

    @described(rule.description)
    def ending(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        row = rule(key, value, config)
        return replace(row, ends=row.outcome is Outcome.refused)

    return ending


def section(rules: Mapping[str, Rule], text: str) -> Rule:
    """A section of keys, each with a rule of its own; the whole section may not be one text or number."""

    @described(text)
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        if not isinstance(value, Mapping):
            return Row(key, value, Outcome.refused, why="must be a section with keys")
        return joined(key, value, apply(rules, {str(name): item for name, item in value.items()}))

    return rule


def joined(key: str, value: Any, parts: Sequence[Row]) -> Row:
    """The row of a section, from the rows of its keys. Their names get the name of the section before them."""
    ours: dict[str, Any] = {}
    for part in parts:
        ours |= part.ours
    found = {part.outcome for part in parts} or {Outcome.unneeded}
    outcome = next(item for item in (Outcome.changed, Outcome.kept, Outcome.refused, Outcome.unneeded) if item in found)
    named = tuple(replace(part, key=f"{key}.{part.key}") for part in parts)
    why = "its keys follow" if outcome is not Outcome.kept else ""
    return Row(key, value, outcome, ours, why, named)


def split(row: Row) -> Row:
    """The row with a part for each key inside of its value, so that each is named; they share the outcome of the row."""
    if row.parts:
        return replace(row, parts=tuple(split(part) for part in row.parts))
    if not isinstance(row.value, (Mapping, list)):
        return row
    items = list(row.value.items() if isinstance(row.value, Mapping) else enumerate(row.value))
    if not any(isinstance(row.value, Mapping) or isinstance(item, Mapping) for _, item in items):
        return row
    parts = (split(replace(row, key=f"{row.key}.{name}", value=item, ours={})) for name, item in items)
    return replace(row, parts=tuple(parts))


def apply(rules: Mapping[str, Rule], config: Mapping[str, Any]) -> list[Row]:
    """A row for each key of a foreign config, in its order. A key that no rule knows is refused, never dropped.

    The name of a rule is a key, or a pattern for keys that have no rule of their own: `liger_*`.
    """
    patterns = [name for name in rules if name.endswith("*")]
    result = []
    for key, value in config.items():
        name = key if key in rules else next((item for item in patterns if fnmatchcase(key, item)), None)
        if value is None:
            result.append(Row(key, value, Outcome.unneeded, why="is not set"))
        elif name is None:
            result.append(Row(key, value, Outcome.refused, why=UNKNOWN))
        else:
            result.append(_decided(rules[name], key, value, config))
    return result


def _decided(rule: Rule, key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """What a rule decides; a value of a type that it cannot read is refused."""
    try:
        return rule(key, value, config)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        return Row(
            key, value, Outcome.refused, why="has a value that cannot be read: see the documentation of the program"
        )
