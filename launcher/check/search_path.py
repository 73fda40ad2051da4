"""Finds the folders that hold config groups beside Muster's own: `--config-dir`, `hydra.searchpath`, and ~/.config/muster/conf."""

import json
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf.errors import ConfigError, Problem

OWN = "~/.config/muster/conf"
"""Groups of the user for all projects, such as ~/.config/muster/conf/cluster/mine.yaml."""
FLAGS = ("--config-dir", "-cd")
KEY = "hydra.searchpath="


def read(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """(the words, with all such folders in one `hydra.searchpath`; the folders). Hydra looks into its own folder first.

    Raises ConfigError for a folder that does not exist.
    """
    kept, given, entries, is_value = list[str](), list[tuple[str, str]](), list[str](), False
    for word in words:
        name, equals, value = word.partition("=")
        if is_value or (name in FLAGS and equals):
            given.append(("--config-dir", word if is_value else value))
            is_value = False
        elif word in FLAGS:
            is_value = True
        elif word.startswith(KEY):
            entries += _entries(word)
        else:
            kept.append(word)
    if is_value:
        given.append(("--config-dir", ""))
    given += [("hydra.searchpath", entry.removeprefix("file://")) for entry in entries if entry.startswith("file://")]
    if missing := [item for item in given if not item[1] or not Path(item[1]).expanduser().is_dir()]:
        reason = "no such folder. Give one that holds groups, as in --config-dir FOLDER for FOLDER/cluster/mine.yaml"
        raise ConfigError(*(Problem(key, folder, reason) for key, folder in missing))
    folders = [Path(folder).expanduser().resolve() for _, folder in given]
    if Path(OWN).expanduser().is_dir():
        folders.append(Path(OWN).expanduser().resolve())
    paths = [f"file://{folder}" for folder in folders] + [item for item in entries if not item.startswith("file://")]
    if paths:
        kept.append(f"{KEY}[{','.join(json.dumps(path, ensure_ascii=False) for path in paths)}]")
    return kept, folders


def _entries(word: str) -> list[str]:
    """The entries of a `hydra.searchpath=[...]`."""
    try:
        value = OverridesParser.create().parse_override(word).value()
    except HydraException:
        value = None
    if not isinstance(value, list):
        message = "is not a list of folders. Write hydra.searchpath=[file:///path/of/folder], or --config-dir FOLDER"
        raise ConfigError(Problem("hydra.searchpath", word.removeprefix(KEY), message))
    return [str(item) for item in value]
