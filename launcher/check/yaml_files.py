"""Says what is wrong in the YAML files of config groups that a launch has chosen: file, line, key and the nearest key that exists.

Hydra and OmegaConf name neither the key nor the line, so this runs where they have refused a file.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import resolve
from conf.errors import Problem
from conf.schema import Config
from conf.schema_model import Architecture
from launcher import sbatch_options
from launcher.check import command_line

GLOBAL = "# @package _global_"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def problems(words: Sequence[str], folders: Sequence[Path], experiments: Sequence[Path] = ()) -> list[Problem]:
    """What is wrong in the files that the overrides `words` choose in `folders`, and in experiments that were given by path."""
    files = _chosen(words, folders, experiments)
    return [
        problem for path, group in files.items() for problem in (*_check(path, group), *_options(path, group, folders))
    ]


def misread(words: Sequence[str], folders: Sequence[Path], experiments: Sequence[Path] = ()) -> list[Problem]:
    """What Hydra reads in these files without a word, but otherwise than it is meant: keys that are there twice, 010 and 12:30."""
    found = list[Problem]()
    for path, group in _chosen(words, folders, experiments).items():
        try:
            text = path.read_text(encoding="utf-8-sig")
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(tree, yaml.MappingNode):
            found += _misread(tree, "" if GLOBAL in text or not group else f"{group}.", path)
    return found


def _misread(tree: yaml.MappingNode, prefix: str, path: Path) -> Iterator[Problem]:
    seen, known = set[str](), resolve.keys()
    for key_node, node in tree.value:
        key, where = f"{prefix}{key_node.value}", f"{path}:{key_node.start_mark.line + 1}: "
        if key in seen:
            yield Problem(f"{where}{key}", None, "is there twice. Remove one of them")
        seen.add(key)
        if isinstance(node, yaml.MappingNode):
            yield from _misread(node, f"{key}.", path)
        elif isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS:
            value = yaml.SafeLoader("").construct_object(node)
            if node.style is None and re.fullmatch(r"[-+]?(0\d[\d_]*|\d[\d_]*(:\d+)+(\.\d*)?)", node.value):
                minutes = sbatch_options.minutes(node.value) if key.endswith("time_min") else None
                remedy = f"Write {minutes}, in minutes" if minutes else "Put it into quotes if it is text"
                yield Problem(f"{where}{key}", node.value, f"YAML reads this as {value}. {remedy}")
            elif known.get(key) is bool and value not in (0, 1):
                yield Problem(f"{where}{key}", node.value, command_line.not_of_type(key, known))


def _options(path: Path, group: str, folders: Sequence[Path]) -> Iterator[Problem]:
    """Entries in the defaults of an experiment that name no group or no option of it."""
    options = command_line.groups(*folders)
    for entry, option, is_override in _defaults(path) if group in ("", "experiment") else ():
        if entry not in options:
            yield Problem(f"{path}: defaults", entry, f"no such group{command_line.nearest(entry, [*options]) or '.'}")
        elif not is_override:
            yield Problem(
                f"{path}: defaults", f"{entry}: {option}", f"must replace one. Write - override /{entry}: {option}"
            )
        elif re.fullmatch(r"[\w.-]+", option) and option not in (*options[entry], "None"):
            message = f"no such option{command_line.nearest(option, options[entry]) or '.'} Choose from {', '.join(options[entry])}"
            yield Problem(f"{path}: defaults: {entry}", option, message)


def _chosen(words: Sequence[str], folders: Sequence[Path], experiments: Sequence[Path]) -> dict[Path, str]:
    """The files, with the group of each; "" for an experiment that was given by path."""
    found: dict[Path, str] = {path.resolve(): "" for path in experiments}
    for word in words:
        group, _, value = word.lstrip("+").partition("=")
        found |= _files(group.split("@")[0], value.strip("[]").split(","), folders)
    for path in [path for path, group in found.items() if group in ("", "experiment")]:
        for group, option, _ in _defaults(path):
            found |= _files(group, [option], folders)
    return found


def _files(group: str, options: Sequence[str], folders: Sequence[Path]) -> dict[Path, str]:
    paths = (folder / group / f"{option.strip()}.yaml" for folder in folders for option in options)
    return {path.resolve(): group for path in paths if group and path.is_file()}


def _defaults(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(group, option, whether it overrides one) of each entry in the defaults of an experiment."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    entries = content.get("defaults") if isinstance(content, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        for group, option in entry.items() if isinstance(entry, dict) else ():
            name = str(group).removeprefix("override").strip().lstrip("/").split("@")[0]
            yield name, str(option), str(group).startswith("override")


def _check(path: Path, group: str) -> Iterator[Problem]:
    """What is wrong in one file, whose keys lie in the section `group`, or anywhere if it says so."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(str(path), None, f"cannot be read: {error}")
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        message = f"is not YAML: {getattr(error, 'problem', error)}. Keys of one section begin in the same column"
        yield Problem(f"{path}{line}", None, message)
        return
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        yield Problem(f"{path}:{tree.start_mark.line + 1}", None, "has no keys. Write key: value")
    elif group == "experiment" and GLOBAL not in text:
        yield Problem(f"{path}:1", None, f"must begin with the line {GLOBAL}: it sets keys of all sections")
    elif tree is not None:
        schema = OmegaConf.structured(Config)
        schema.model.architecture = Architecture  # null in the schema, so its keys could not be checked
        prefix = "" if GLOBAL in text or not group else f"{group}."
        yield from _mapping(tree, prefix, path, schema)


def _mapping(tree: yaml.MappingNode, prefix: str, path: Path, schema: DictConfig) -> Iterator[Problem]:
    known, seen = resolve.keys(), set[str]()
    for key_node, value_node in tree.value:
        name = str(key_node.value)
        key, where = f"{prefix}{name}", f"{path}:{key_node.start_mark.line + 1}: "
        if name in seen:
            yield Problem(f"{where}{key}", None, "is there twice. Remove one of them")
        seen.add(name)
        if prefix.count(".") <= 1 and name in ("defaults", "hydra"):
            continue
        if key not in known:
            yield Problem(f"{where}{key}", None, f"no such key{command_line.instead(key, list(known))}")
        elif resolve.section_of(known[key]) and isinstance(value_node, yaml.MappingNode):
            yield from _mapping(value_node, f"{key}.", path, schema)
        elif not str(known[key]).startswith("dict"):
            yield from _value(key, where, value_node, schema)


def _value(key: str, where: str, node: yaml.Node, schema: DictConfig) -> Iterator[Problem]:
    """A value of a wrong type. Interpolations and values that are still missing have none yet."""
    loader = yaml.SafeLoader("")
    value: Any = loader.construct_object(node, deep=True)
    if isinstance(value, str) and ("${" in value or value == "???"):
        return
    try:
        OmegaConf.update(schema, key, value)
    except OmegaConfBaseException:
        yield Problem(f"{where}{key}", value, command_line.not_of_type(key, resolve.keys(), value))
