"""Turns what Hydra composed into a Config, and a Config into the YAML of the run folder and back."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError, Problem
from conf.files import write_text
from conf.schema import Config


def resolve(composed: DictConfig) -> Config:
    """The typed Config of a composed one.

    Raises ConfigError naming every value still missing, every key the schema does not know, and every bad value.
    """
    try:
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(*(Problem(key, None, f"needs a value: add {key}=... to the command") for key in missing))
        plain = OmegaConf.to_container(composed, resolve=True)
        if misfits := _misfits(plain, Config):
            raise ConfigError(*misfits)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(Problem(str(error.full_key or "config"), None, str(error.msg).splitlines()[0])) from error
    assert isinstance(config, Config)
    _sectioned(config)
    return config


LAUNCH_ONLY = ("resume", "dry_run", "submit")
"""Keys that belong to one command, not to the run."""


def dump(config: Config) -> str:
    """The whole config as YAML text, in the order of the schema, without what belongs to one command."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config, without=LAUNCH_ONLY)))


def digest(config: Config) -> str:
    """What tells two configs of a run apart, whichever jobs are asked of them: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(_plain(config, without=(*LAUNCH_ONLY, "jobs"))).encode()).hexdigest()[:16]


def _plain(config: Config, without: tuple[str, ...]) -> dict[str, Any]:
    """Nested dictionaries of YAML's own types; written out because OmegaConf's conversion takes 30 ms a call."""

    def convert(value: Any) -> Any:
        if is_dataclass(value):
            return {name: convert(item) for name, item in vars(value).items()}
        if isinstance(value, dict):
            return {name: convert(item) for name, item in value.items()}
        if isinstance(value, list):
            return [convert(item) for item in value]
        if isinstance(value, str):
            return value.replace("${", "\\${")  # what is resolved already must not be taken for an interpolation again
        return value.name if isinstance(value, Enum) else value

    return {name: convert(value) for name, value in vars(config).items() if name not in without}


def save(config: Config, path: Path) -> None:
    """Publish the config as YAML, readable by the user alone."""
    write_text(path, dump(config))


def load(path: Path) -> Config:
    """The config that `save` wrote. Raises ConfigError when the file is absent or does not fit the schema."""
    try:
        stored = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), None, "no such file; a run folder has a config.yaml")) from None
    assert isinstance(stored, DictConfig)
    return resolve(stored)


def keys(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type; dictionaries, whose keys are the user's, are one key."""
    found: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for item in fields(schema):
        name, section = prefix + item.name, _section(hints[item.name])
        found[name] = hints[item.name]
        if section is not None:
            found |= keys(section, f"{name}.")
    return found


def _section(hint: Any) -> type | None:
    """The dataclass behind a field's type, also where it is optional."""
    candidates = [hint, *get_args(hint)]
    return next((item for item in candidates if isinstance(item, type) and is_dataclass(item)), None)


def named_sections(schema: type = Config, prefix: str = "") -> dict[str, type]:
    """Dotted keys of the dictionaries whose entries are sections, each with what an entry is."""
    found: dict[str, type] = {}
    hints = get_type_hints(schema)
    for item in fields(schema):
        if "section" in item.metadata:
            found[prefix + item.name] = item.metadata["section"]
        elif section := _section(hints[item.name]):
            found |= named_sections(section, f"{prefix}{item.name}.")
    return found


def _misfits(plain: Any, schema: type, prefix: str = "") -> list[Problem]:
    """Keys the schema does not know, and dictionaries where it has a list: OmegaConf names neither by its key."""
    found = []
    hints = get_type_hints(schema)
    named = {item.name: item.metadata["section"] for item in fields(schema) if "section" in item.metadata}
    for key, value in plain.items():
        path = prefix + key
        if key not in hints:
            found.append(Problem(path, None, "no such key"))
        elif isinstance(value, dict) and str(hints[key]).startswith("list"):
            found.append(Problem(path, value, "is not a list"))
        elif key in named:
            for name, entry in value.items():
                found += _entry_misfits(entry, named[key], f"{path}.{name}")
        elif (section := _section(hints[key])) and value is not None:
            found += _misfits(value, section, f"{path}.")
    return found


def _entry_misfits(entry: Any, section: type, path: str) -> list[Problem]:
    """What is wrong with one entry of a dictionary of sections: its keys, its types, what it lacks."""
    if not isinstance(entry, dict):
        return [Problem(path, entry, "is a section of its own: set keys inside it")]
    if found := _misfits(entry, section, f"{path}."):
        return found
    try:
        made = OmegaConf.merge(OmegaConf.structured(section), entry)
    except OmegaConfBaseException as error:
        return [Problem(f"{path}.{error.full_key}", None, str(error.msg).splitlines()[0])]
    return [Problem(f"{path}.{key}", None, "needs a value") for key in sorted(OmegaConf.missing_keys(made))]


def _sectioned(config: Config) -> None:
    """Make typed entries of the dictionaries whose entries are sections: OmegaConf refuses such a type in `++key=value`."""
    for key, section in named_sections().items():
        parent, name = config, key
        while "." in name:
            head, name = name.split(".", 1)
            parent = getattr(parent, head)
        plain = getattr(parent, name)
        setattr(
            parent,
            name,
            {
                entry: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), value))
                for entry, value in plain.items()
            },
        )
