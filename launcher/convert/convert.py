"""Reads a config of another program and makes an experiment of it: `muster import FILE`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from conf import resolve
from conf.errors import ConfigError, Problem, first_line
from launcher.convert import axolotl, llamafactory, ms_swift, sharding_keys, trl
from launcher.convert.keys import Outcome, Row, apply
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
    counts = {name: len(module.MARKERS & set(config)) for name, module in PROGRAMS.items()}
    best = max(counts.values())
    names = [name for name, count in counts.items() if count == best]
    if best == 0 or len(names) > 1:
        message = f"does not show which program it is for. Add --as {'|'.join(PROGRAMS)}"
        raise ConfigError(Problem("FILE", path, message))
    return names[0]


def table(config: Mapping[str, Any], program: str, gpus: int, folder: Path) -> list[Row]:
    """A row for each key, in the order of the file. A DeepSpeed JSON that `deepspeed` names in `folder` gets rows of its own."""
    rows = []
    for row in apply(PROGRAMS[program].rules(gpus), config):
        settings = _deepspeed(row.value, folder) if row.key == "deepspeed" else None
        if settings is None:
            rows.append(row)
        else:
            rows.append(Row(row.key, row.value, Outcome.kept, why="its keys follow"))
            rows += sharding_keys.deepspeed_rows(settings)
    return reconcile(rows)


def _deepspeed(value: Any, folder: Path) -> dict[str, Any] | None:
    """DeepSpeed's settings, in the config itself or in a file beside it; None if there are none."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        return None
    for path in (folder / value, Path(value)):
        if path.is_file():
            try:
                settings = json.loads(path.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise ConfigError(Problem("deepspeed", path, f"is not JSON: {error}")) from None
            return settings if isinstance(settings, dict) else None
    return None


def experiment(rows: list[Row], program: str) -> dict[str, Any]:
    """Muster's keys of an imported config, with the defaults of its program that differ from Muster's."""
    ours: dict[str, Any] = {}
    for row in rows:
        if row.outcome in (Outcome.kept, Outcome.changed):
            ours |= row.ours
    defaults = dict(PROGRAMS[program].DEFAULTS)
    ours.setdefault("/parallel", defaults.pop("parallel"))
    if "train.warmup_steps" in ours or "train.warmup_ratio" in ours or ours.get("train.lr_schedule") == "constant":
        defaults.pop("train.warmup_steps", None)
        defaults.pop("train.warmup_ratio", None)
    ours = {key: value for key, value in defaults.items() if value is not None} | ours
    stored = ours.pop("adapter.base", None)
    if stored or ours.get("/adapter") == "qlora":  # the group that stores the base like this
        ours["/adapter"] = "qlora8" if stored == "int8" else "qlora"
    return ours


def text(ours: Mapping[str, Any], source: Path, program: str, rows: list[Row]) -> str:
    """The experiment as a file of conf/experiment."""
    lines = ["# @package _global_", f"# {source.name} of {TITLES[program]}, by `muster import`"]
    lines += [f"# not imported: {row.key}" for row in rows if row.outcome is Outcome.refused]
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
