"""The data sets of an Axolotl file: a row for each of their keys, and Muster's set that they make together."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.convert import axolotl_set_keys
from launcher.convert.keys import Outcome, Row, described


@described("`data.path`, or `data.sets`")
def datasets(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """The training sets: one becomes `data.path`, several become `data.sets`."""
    if isinstance(value, (Mapping, str)):
        value = [value]
    if not isinstance(value, list) or not value:
        return Row(key, value, Outcome.refused, why="must be a list of sets with path and type")
    items = [item if isinstance(item, Mapping) else {"path": item} for item in value]
    read = [_read(key, number, item) for number, item in enumerate(items)]
    ours = _named([found for found, _ in read])
    for found, _ in read:
        ours |= found.shared
    if any(found.ours.get("format") != "text" for found, _ in read):
        ours.pop("data.overlong", None)
    parts = tuple(part for _, rows in read for part in rows)
    return Row(key, _sets(len(value)), _outcome(parts), ours, _reasons(parts), parts)


def _sets(count: int) -> str:
    return f"{count} set{'s' * (count > 1)}"


def _reasons(parts: tuple[Row, ...]) -> str:
    """What differs, of the keys of sets that are not kept as they are."""
    found = (part.why for part in parts if part.outcome in (Outcome.changed, Outcome.refused))
    return "; ".join(dict.fromkeys(found))


def _outcome(parts: tuple[Row, ...]) -> Outcome:
    found = {part.outcome for part in parts}
    return Outcome.changed if {Outcome.changed, Outcome.refused} & found else Outcome.kept


def _read(key: str, number: int, item: Mapping[str, Any]) -> tuple[axolotl_set_keys.Found, list[Row]]:
    """(the set, a row for each of its keys)."""
    found = axolotl_set_keys.Found(item)
    rows = []
    for name, value in item.items():
        label = f"{key}.{number}.{name}"
        if value is None:
            rows.append(Row(label, value, Outcome.unneeded, why="is not set"))
        elif name == "message_property_mappings" and isinstance(value, Mapping):
            for inner, column in value.items():
                outcome, why = axolotl_set_keys.named_property(inner)(found, column)
                rows.append(Row(f"{label}.{inner}", column, outcome, why=why))
        elif isinstance(value, Mapping) and name == "type":
            _, why = axolotl_set_keys.kind(found, value)
            rows += [Row(f"{label}.{inner}", text, Outcome.kept, why=why) for inner, text in value.items()]
        else:
            outcome, why = axolotl_set_keys.READERS.get(name, axolotl_set_keys.unknown)(found, value)
            rows.append(Row(label, value, outcome, why=why))
    if isinstance(item.get("type"), Mapping) or found.ours.get("format") == "prompt_completion":
        found.fields = {name: column for name, column in found.fields.items() if name in ("prompt", "completion")}
    if found.fields:
        found.ours["fields"] = found.fields
    return found, rows


def _named(sets: list[axolotl_set_keys.Found]) -> dict[str, Any]:
    """Keys of `data` for one set, or of `data.sets` for several."""
    if len(sets) == 1 and "weight" not in sets[0].ours:
        ours = {f"data.{name}": item for name, item in sets[0].ours.items()}
        return {"/data": "jsonl", **ours, "data.name": _name(sets[0].ours, 0, set())}
    taken: set[str] = set()
    return {
        "/data": "mix",
        "data.sets": {_name(item.ours, number, taken): item.ours for number, item in enumerate(sets)},
    }


def _name(data_set: Mapping[str, Any], number: int, taken: set[str]) -> str:
    """A short name for a set, from its path."""
    last = Path(str(data_set.get("path") or "")).name.split(".")[0]
    name = re.sub(r"\W+", "_", last).strip("_") or f"set{number}"
    name = f"{name}{number}" if name in taken else name
    taken.add(name)
    return name


@described("`data.validation_path`")
def test_datasets(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """The validation set; its format and columns are those of the training set."""
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], Mapping):
        return Row(key, value, Outcome.refused, why="Muster has one data.validation_path. Join the sets into one file")
    found, parts = _read(key, 0, value[0])
    ours = {"data.validation_path": found.ours["path"]}
    if "split" in found.ours:
        ours["data.validation_split"] = found.ours["split"]
    why = "; ".join(filter(None, ["in the format of the training set", _reasons(tuple(parts))]))
    outcome = Outcome.refused if any(part.outcome is Outcome.refused for part in parts) else Outcome.changed
    return Row(key, "1 set", outcome, ours if outcome is Outcome.changed else {}, why, tuple(parts))
