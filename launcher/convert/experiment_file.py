"""An experiment by its path: `python launch.py my.yaml` is like `experiment=my` for a file outside of conf/experiment."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conf import resolve
from conf.errors import ConfigError, Problem
from launcher.convert import convert

SUFFIXES = (".yaml", ".yml")


def register(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """(the command line with `experiment=NAME` for each path of an experiment, those paths).

    Raises ConfigError for a file that cannot be read, that has keys of another program, or keys that Muster does not have.
    """
    result, paths = list[str](), list[Path]()
    for word in words:
        if word.startswith("-") or "=" in word or not word.endswith(SUFFIXES):
            result.append(word)
            continue
        path = Path(word).expanduser()
        content = convert.read(path)
        _require_own_keys(content, path)
        paths.append(path)
        node = OmegaConf.create(content)
        assert isinstance(node, DictConfig)
        ConfigStore.instance().store(group="experiment", name=path.stem, node=node, package="_global_")
        result.append(f"experiment={path.stem}")
    return result, paths


def _require_own_keys(content: dict[str, object], path: Path) -> None:
    known = {key.split(".")[0] for key in resolve.keys()} | {"defaults", "hydra"}  # noqa: SIM118
    if not (foreign := [key for key in content if key not in known]):
        return
    if 2 * len(foreign) >= len(content) and any(module.MARKERS & set(content) for module in convert.PROGRAMS.values()):
        message = f"is a config of another program. Turn it into an experiment: muster import {path}"
        raise ConfigError(Problem("FILE", path, message))
    raise ConfigError(*(Problem(key, None, f"no such key (in {path}). docs/keys.md lists all keys") for key in foreign))
