"""Converts what Hydra composed to a typed Config, and a Config to the YAML file of the run folder and back."""

import hashlib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import text
from conf.errors import ConfigError, Problem
from conf.files import write_text
from conf.schema import Config


def resolve(composed: DictConfig) -> Config:
    """Convert a composed config to a typed Config.

    Raises ConfigError naming every value that is missing, every key that the schema does not have, every text with a control
    character, and the first value of a wrong type.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(*(Problem(key, None, f"needs a value. Add {key}=... to the command") for key in missing))
        plain = OmegaConf.to_container(composed, resolve=True)
        if problems := _schema_problems(plain, Config):
            raise ConfigError(*problems)
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), _escaped(plain)))
    except OmegaConfBaseException as error:
        message = str(error.msg).splitlines()[0]
        if "Interpolation key" in message:
            message += ". For a variable that the node expands write $NAME, without braces"
        if match := re.search(r"Environment variable '(\w+)' not found", message):
            message = f"the variable {match[1]} is not set here. Export it, or write ${{oc.env:{match[1]},DEFAULT}}"
        raise ConfigError(Problem(str(error.full_key or "config"), None, message)) from error
    assert isinstance(config, Config)
    _type_named_sections(config)
    if problems := list(text.problems(config)):
        raise ConfigError(*problems)
    return config


@cache
def _schema() -> DictConfig:
    """The schema as OmegaConf needs it. Making it takes as long as reading a config; nothing may change it."""
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


LAUNCH_ONLY = ("resume", "dry_run", "submit")
"""Keys that belong to one command, not to the run. They are not stored."""
NOT_COMPUTED = (*LAUNCH_ONLY, "jobs", "hub", "sweep")
"""Keys that change which jobs of a run start, or when, but not what they compute."""


def dump(config: Config) -> str:
    """The config as YAML text, in the order of the schema, without the keys in `LAUNCH_ONLY`."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def digest(config: Config) -> str:
    """A hash of what the run computes, 16 hexadecimal digits. `NOT_COMPUTED` and `train.resume_step` do not change it."""
    values = plain(config, without=NOT_COMPUTED)
    del values["train"]["resume_step"]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def plain(config: Config, without: tuple[str, ...] = LAUNCH_ONLY) -> dict[str, Any]:
    """The config as nested dictionaries of YAML's own types. Done by hand, because OmegaConf's conversion takes 30 ms."""

    return {name: _escaped(value) for name, value in vars(config).items() if name not in without}


def _escaped(value: Any) -> Any:
    """A resolved value in YAML's own types, in which no text is read as an interpolation again."""
    if is_dataclass(value):
        return {name: _escaped(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", "\\${")
    return value.name if isinstance(value, Enum) else value


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested dictionaries. An empty dictionary is a value."""
    values: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def save(config: Config, path: Path) -> None:
    """Write the config as YAML."""
    write_text(path, dump(config))


def load(path: Path) -> Config:
    """Read a config that `save` wrote. Raises ConfigError if the file is missing, damaged or does not match the schema."""
    try:
        return deepcopy(_parsed(path.read_bytes(), str(path)))
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), None, "no such file. Use a run folder: it has a config.yaml")) from None


@lru_cache(maxsize=8)
def _parsed(content: bytes, path: str) -> Config:
    """The config in a file. Kept, because a launch reads the same file several times, and each time takes 200 ms."""
    try:
        stored = OmegaConf.create(content.decode())
    except Exception as error:  # whatever a YAML parser raises for a file that somebody else may have written
        reason = (
            f"is not the config of a run ({type(error).__name__}). Use the folder of a run that Muster has launched"
        )
        raise ConfigError(Problem(path, None, reason)) from error
    if not isinstance(stored, DictConfig):
        raise ConfigError(Problem(path, None, "is not the config of a run: it has no keys"))
    _rename_old_keys(stored)
    return resolve(stored)


def _rename_old_keys(stored: DictConfig) -> None:
    """Give the container of a run that an earlier version started the keys of today, in place."""
    cluster = stored.get("cluster")
    if not isinstance(cluster, DictConfig) or not isinstance(cluster.get("container"), str):
        return
    runtime, image = cluster.pop("container"), cluster.pop("container_image", None)
    cluster.container = {"image": image, "mounts": cluster.pop("container_mounts", [])}
    if runtime != "none":
        cluster.container.runtime = runtime


def keys(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type. A free-form dictionary is one key: its own keys are the user's."""
    types: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for item in fields(schema):
        name, section = prefix + item.name, section_of(hints[item.name])
        types[name] = hints[item.name]
        if section is not None:
            types |= keys(section, f"{name}.")
    return types


def section_of(hint: Any) -> type | None:
    """The dataclass in a field's type, also in `Dataclass | None`; None for other types."""
    candidates = [hint, *get_args(hint)]
    return next((item for item in candidates if isinstance(item, type) and is_dataclass(item)), None)


def named_sections(schema: type = Config, prefix: str = "") -> dict[str, type]:
    """The dictionaries of sections under names that the user chooses: dotted key -> dataclass of an entry."""
    sections: dict[str, type] = {}
    hints = get_type_hints(schema)
    for item in fields(schema):
        if "section" in item.metadata:
            sections[prefix + item.name] = item.metadata["section"]
        elif section := section_of(hints[item.name]):
            sections |= named_sections(section, f"{prefix}{item.name}.")
    return sections


def _schema_problems(plain: Any, schema: type, prefix: str = "") -> list[Problem]:
    """Keys that the schema does not have, and values that are not the list or dictionary they must be.

    OmegaConf's errors do not name the keys of these, and it takes a list inside a list for an item of any type.
    """
    problems = []
    hints = get_type_hints(schema)
    named = {item.name: item.metadata["section"] for item in fields(schema) if "section" in item.metadata}
    for name, value in plain.items():
        key = prefix + name
        if name not in hints:
            problems.append(Problem(key, None, "no such key. docs/keys.md lists all keys"))
        elif value is not None and str(hints[name]).startswith("list") and not _is_list(value, hints[name]):
            problems.append(Problem(key, value, f"must be {describe_list(hints[name])}"))
        elif value is not None and str(hints[name]).startswith("dict") and not isinstance(value, dict):
            problems.append(Problem(key, value, "must be a dictionary, for example {name: value}"))
        elif name in named:
            for entry_name, entry in value.items():
                problems += _entry_problems(entry, named[name], f"{key}.{entry_name}")
        elif (section := section_of(hints[name])) and value is not None and not isinstance(value, dict):
            problems.append(
                Problem(key, value, f"has keys of its own. Set them, for example {key}.{fields(section)[0].name}")
            )
        elif section and value is not None:
            problems += _schema_problems(value, section, f"{key}.")
    return problems


def _is_list(value: Any, hint: Any) -> bool:
    """Whether a value is a list, and its items are plain values, or names of the enumeration in `hint`."""
    (item_type,) = get_args(hint)
    if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
        return False
    names = getattr(item_type, "__members__", None)
    return names is None or all(isinstance(item, Enum) or item in names for item in value)


def describe_list(hint: Any) -> str:
    """A type of list in plain words, with the values that exist if they are fixed: `a list, for example [a,b]`."""
    (item,) = get_args(hint) or (str,)
    if isinstance(item, type) and issubclass(item, Enum):
        names = list(item.__members__)
        return f"a list of {', '.join(names[:-1])} or {names[-1]}, for example [{','.join(names[-2:])}]"
    if item is int:
        return "a list of whole numbers, for example [0,1]"
    return "a list, for example [a,b]"


def _entry_problems(entry: Any, section: type, key: str) -> list[Problem]:
    """What is wrong with one entry of a dictionary of sections: unknown keys, wrong types, missing values."""
    if not isinstance(entry, dict):
        return [Problem(key, entry, f"must be a section. Set keys in it, for example {key}.path=...")]
    if problems := _schema_problems(entry, section, f"{key}."):
        return problems
    try:
        merged = OmegaConf.merge(OmegaConf.structured(section), entry)
    except OmegaConfBaseException as error:
        return [Problem(f"{key}.{error.full_key}", None, str(error.msg).splitlines()[0])]
    missing = sorted(OmegaConf.missing_keys(merged))
    return [Problem(f"{key}.{name}", None, f"needs a value. Add {key}.{name}=... to the command") for name in missing]


def _type_named_sections(config: Config) -> None:
    """Convert the entries of each dictionary of sections to dataclasses, in place.

    The schema cannot give such a dictionary its type: OmegaConf then refuses `++key=value` overrides in it.
    """
    for key, section in named_sections().items():
        *parents, name = key.split(".")
        parent: Any = config
        for step in parents:
            parent = getattr(parent, step)
        entries = {
            entry_name: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), entry))
            for entry_name, entry in getattr(parent, name).items()
        }
        setattr(parent, name, entries)
