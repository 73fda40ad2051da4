"""Finds the folders that jobs in a container need for data and models, and adds them to `cluster.container.mounts`."""

import os
import re
from collections.abc import Iterator
from glob import glob
from itertools import islice
from pathlib import Path

from conf.datasets import held_out, training, training_paths
from conf.errors import UserError
from conf.schema import Config
from launcher import secrets_file
from launcher.containers import parsed

HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE")
"""Variables that move a part of the Hub's cache. Jobs inherit them from the shell of launch.py."""
MAX_ENTRIES = 10_000
"""Entries of a folder that are searched for links that lead out of it."""


def localize(config: Config) -> None:
    """Make the paths of the container absolute, and add what it must mount, in place. Other paths must be absolute already."""
    container, cluster = config.cluster.container, config.cluster
    image = Path(str(container.image)).expanduser()
    container.image = str(image.absolute()) if image.exists() else container.image
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cluster.hf_home = cluster.hf_home or os.path.abspath(Path(os.path.expandvars(home)).expanduser())
    for name in ("scratch", "hf_home", "secrets_file"):
        setattr(cluster, name, str(Path(getattr(cluster, name)).expanduser()))
    secrets = [Path(cluster.secrets_file)] if secrets_file.names(config) and _may_exist(cluster.secrets_file) else []
    targets = {parsed(entry).target for entry in container.mounts}
    for folder in dict.fromkeys([*secrets, *_folders(config)]):
        if not any(folder.is_relative_to(target) for target in targets):
            container.mounts.append(str(folder))
            targets.add(str(folder))


def _may_exist(path: str) -> bool:
    """Without the file, all secrets are in the environment, and a container would not start."""
    return "$" in path or Path(path).exists()


def _folders(config: Config) -> Iterator[Path]:
    """The folders of all local files of the config, and those that links in them lead to."""
    paths: list[str | None] = [path for _, path in training_paths(config.data)]
    try:
        sets = [*training(config.data).values(), *([found] if (found := held_out(config.data)) else [])]
        paths += [data_set.path for data_set in sets]
    except UserError:  # the checks report it
        pass
    paths += [config.data.validation_path, config.data.chat_template, config.model.source, config.model.tokenizer]
    paths += [config.adapter.source]
    paths += [config.generate.prompts] if "generate" in config.jobs else []
    paths += [re.sub("^(file|sqlite)://+", "/", config.tracker.uri or "")]
    for path in paths:
        if path and path.startswith("/"):
            yield from _folders_of(Path(path))
    for name in HUB_VARIABLES:
        if value := os.environ.get(name):
            yield Path(value).expanduser().absolute()


def _folders_of(path: Path) -> Iterator[Path]:
    """The folder itself, the folder of a file, or the closest folder of a pattern or of `folder:split`, with its links.

    In the Hub's cache, for example, the files of a snapshot are links to another folder.
    """
    folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
    if folder == Path("/"):  # nothing is there, as the checks report
        return
    yield folder
    files = glob(str(path), recursive=True) if path != folder else islice(folder.rglob("*"), MAX_ENTRIES)
    for entry in (folder, *map(Path, files)):
        if (target := entry.resolve()) != entry.absolute() and not target.is_relative_to(folder):
            yield target if target.is_dir() else target.parent
