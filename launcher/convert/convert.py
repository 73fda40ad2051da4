"""Reads a config of another program and makes an experiment of it: `muster import FILE`."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from conf import resolve
from conf.errors import ConfigError, Problem, first_line
from conf.visible import visible
from launcher.convert import axolotl, llamafactory, ms_swift, other_files, sharding_keys, trl
from launcher.convert.common_rules import HELD_OUT_ROWS
from launcher.convert.keys import Outcome, Row, apply, split
from launcher.convert.reconcile import reconcile

PROGRAMS: dict[str, ModuleType] = {"axolotl": axolotl, "llamafactory": llamafactory, "trl": trl, "ms-swift": ms_swift}
TITLES = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL", "ms-swift": "ms-swift"}


def read(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file. Raises ConfigError with the line of a mistake."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("FILE", path, f"cannot be read: {first_line(error)}")) from None
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(Problem("FILE", path, f"is not YAML{where}: {getattr(error, 'problem', error)}")) from None
    if not isinstance(config, dict):
        raise ConfigError(Problem("FILE", path, "has no keys. Give the YAML file of a training"))
    return {str(key): value for key, value in config.items()}


def program_of(config: Mapping[str, Any], path: Path) -> str:
    """The program whose keys a config has. Raises ConfigError if that is not clear."""
    other_files.refuse(config, path)
    counts = {name: len(module.MARKERS & set(config)) for name, module in PROGRAMS.items()}
    best = max(counts.values())
    names = [name for name, count in counts.items() if count == best]
    if best == 0 or len(names) > 1:
        message = f"does not show which program it is for. Add --as {'|'.join(PROGRAMS)}, if it describes a training"
        raise ConfigError(Problem("FILE", path, message))
    return names[0]


def table(config: Mapping[str, Any], program: str, gpus: int, folder: Path) -> list[Row]:
    """A row for each key, in the order of the file, and one for each default of the program that Muster does not have.

    A DeepSpeed or FSDP JSON that `deepspeed` or `fsdp` names, beside the file or above it, gets rows of its own.
    """
    rows = []
    for row in apply(PROGRAMS[program].rules(gpus), config):
        settings = _settings(row, folder)
        if settings is None:
            rows.append(row)
        elif row.key == "deepspeed":
            rows.append(Row(row.key, row.value, Outcome.kept, why="its keys follow"))
            rows += sharding_keys.deepspeed_rows(settings)
        else:
            rows += [replace(found, key=f"{row.key} {found.key}") for found in sharding_keys.fsdp_rows(settings)]
    return [
        split(row)
        for row in reconcile([*rows, *_default_rows(rows, PROGRAMS[program].defaults(config, gpus), program)])
    ]


def _default_rows(rows: list[Row], defaults: Mapping[str, Any], program: str) -> list[Row]:
    """A row for each default under a key that the file does not set, and that has an effect."""
    ours = _ours(rows)
    idle = {name for decider, names in DECIDED.items() if decider in ours or decider in defaults for name in names}
    if ours.get("train.lr_schedule") == "constant":
        idle |= {"train.warmup_steps", "train.warmup_ratio"}
    adapter = ours.get("/adapter", defaults.get("/adapter", "none"))
    if adapter == "none" or "adapter.source" in ours:
        idle |= {key for key in defaults if key.startswith("adapter.")}
    why = f"a default of {TITLES[program]}"
    return [
        value if isinstance(value, Row) else Row(f"default: {key.lstrip('/')}", value, Outcome.kept, {key: value}, why)
        for key, value in defaults.items()
        if key not in ours and key not in idle
    ]


DECIDED = {
    "train.steps": ("train.epochs",),
    "train.warmup_steps": ("train.warmup_ratio",),
    "train.warmup_ratio": ("train.warmup_steps",),
    "data.validation_path": ("data.validation_fraction",),
    HELD_OUT_ROWS: ("data.validation_fraction",),
}
"""A key that is set -> keys whose defaults then have no effect."""


def _settings(row: Row, folder: Path) -> dict[str, Any] | None:
    """Settings of DeepSpeed or FSDP, in the config itself or in a JSON file beside it or above it; None if there are none."""
    if row.key not in ("deepspeed", "fsdp"):
        return None
    if isinstance(row.value, dict):
        return row.value
    if not isinstance(row.value, str) or not row.value.endswith(".json"):
        return None
    if (path := found_above(row.value, folder)) is None:
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(row.key, path, f"is not JSON: {error}")) from None
    return settings if isinstance(settings, dict) else None


def found_above(name: str, folder: Path) -> Path | None:
    """The file of this relative path in `folder`, in a folder above it, or where the command runs: programs run in their clone."""
    here = folder.resolve()
    paths = (base / name for base in (here, *here.parents, Path()))
    return next((path for path in paths if path.is_file()), None)


def _ours(rows: list[Row]) -> dict[str, Any]:
    """Muster's keys of all rows. Without a layout of its own, a program trains with plain data parallelism."""
    ours: dict[str, Any] = {"/parallel": "ddp"}
    for row in rows:
        if row.outcome in (Outcome.kept, Outcome.changed):
            ours |= row.ours
    return ours


def experiment(rows: list[Row]) -> dict[str, Any]:
    """Muster's keys of an imported config, with the defaults of its program that differ from Muster's."""
    ours = _ours(rows)
    stored = ours.pop("adapter.base", None)
    if stored or ours.get("/adapter") == "qlora":  # the group that stores the base like this
        ours["/adapter"] = "qlora8" if stored == "int8" else "qlora"
    return ours


def text(ours: Mapping[str, Any], source: Path, program: str, rows: list[Row]) -> str:
    """The experiment as a file of conf/experiment."""
    lines = ["# @package _global_", f"# {source.name} of {TITLES[program]}, by `muster import`"]
    leaves = (leaf for row in rows for leaf in row.leaves())
    lines += [f"# not imported: {visible(leaf.key)}" for leaf in leaves if leaf.outcome is Outcome.refused]
    groups = {key[1:]: value for key, value in ours.items() if key.startswith("/")}
    lines += ["defaults:", *(f"  - override /{group}: {option}" for group, option in sorted(groups.items()))]
    nested: dict[str, Any] = {}
    for key, value in ours.items():
        if not key.startswith("/"):
            *sections, name = key.split(".")
            target = nested
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
    order = list(resolve.keys())
    body = dict(sorted(nested.items(), key=lambda item: order.index(item[0])))
    dumped: str = yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, dumped])


def name_of(path: Path) -> str:
    """The name of an experiment, from the name of a file."""
    return re.sub(r"[^\w.+-]+", "-", path.stem).strip("-.") or "imported"
