"""What becomes of one key of a foreign config: the rules from which the tables of each program are made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


def choice(options: Mapping[Any, Mapping[str, Any]], otherwise: str) -> Rule:
    """One of the values in `options`, each with Muster's keys. Any other value is refused with `otherwise`."""
    ours = dict.fromkeys(f"`{key.lstrip('/')}`" for option in options.values() for key in option)

    @described(", ".join(ours) or otherwise)
    def rule(key: str, value: Any, _: Mapping[str, Any]) -> Row:
        name = str(value).lower()
        if name not in options:
            return Row(key, value, Outcome.refused, why=otherwise)
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
            result.append(Row(key, value, Outcome.refused, why="unknown: look for it in docs/coming-from.md"))
        else:
            result.append(rules[name](key, value, config))
    return result
