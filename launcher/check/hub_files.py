"""Looks whether the Hub's cache has what an offline run reads: a model's files, a tokenizer, rows.

It only reports: `launcher.check.hub_rules` decides. Nothing is downloaded, and the Hub is not asked.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.choices import Init
from conf.datasets import all_sets
from conf.schema import Config
from conf.schema_model import DataSet
from launcher.check import model_files

READS_MODEL = frozenset({"fetch", "preprocess", "train", "consolidate", "evaluate", "generate"})
READS_ROWS = frozenset({"fetch", "preprocess"})
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class HubHome:
    """Where the jobs keep what they get from the Hub, and their environment."""

    home: Path
    """HF_HOME."""
    cache: Path
    """HF_HUB_CACHE."""
    environ: Mapping[str, str]
    """That of launch.py, with the secrets that jobs take from `cluster.secrets_file`."""


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub that the config names."""

    key: str
    """The config key that names it."""
    kind: str
    """`model` or `dataset`."""
    name: str
    revision: str | None = None


def is_hub_id(value: str) -> bool:
    """Whether a value names a repository of the Hub: it has the shape of one, and there is no such path here."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) is not None and value[0] not in ".~" and not Path(value).exists()


def repositories(config: Config) -> Iterator[Repository]:
    """The repositories of the Hub that the run's jobs read."""
    if READS_MODEL & set(config.jobs):
        model = config.model
        if is_hub_id(model.source):
            yield Repository("model.source", "model", model.source, model.revision)
        if model.tokenizer and is_hub_id(model.tokenizer):
            yield Repository("model.tokenizer", "model", model.tokenizer)
    if READS_ROWS & set(config.jobs):
        for key, data_set in all_sets(config.data):
            if name := hub_name(data_set):
                yield Repository(key, "dataset", name, data_set.revision)


def hub_name(data_set: DataSet) -> str | None:
    """The repository of a set, `owner/name` of `owner/name:train[:100]`; None if its rows are not on the Hub."""
    name = data_set.path.partition(":")[0]
    return name if "://" not in data_set.path and is_hub_id(name) else None


def missing(config: Config, hub: HubHome) -> Iterator[tuple[str, str, str]]:
    """(key, value, what is not in the cache) of what an offline run could not read.

    The cache of a container, or one whose path has a variable that only the node knows, is not seen here.
    """
    if "fetch" in config.jobs or (config.cluster.container.image and not hub.home.exists()) or "$" in str(hub.home):
        return
    for item in repositories(config):
        if item.kind == "model":
            weights = item.key == "model.source" and config.model.init is Init.pretrained
            if what := _missing_of_model(item, hub.cache, weights, config.model.tokenizer is None):
                yield item.key, item.name, what
        elif not has_rows(item.name, hub):
            yield item.key, item.name, "the rows"
    for key, data_set in all_sets(config.data) if READS_ROWS & set(config.jobs) else ():
        if data_set.path.startswith("hf://"):
            yield key, data_set.path, ""


def _missing_of_model(item: Repository, cache: Path, weights: bool, tokenizer: bool) -> str | None:
    """What a model's copy in the cache lacks; None if it has all."""
    folder = model_files.find(item.name, item.revision, cache)
    if folder is None:
        return "this model" + (f" at revision {item.revision}" if item.revision else "")
    if (tokenizer or item.key == "model.tokenizer") and not any((folder / name).exists() for name in TOKENIZERS):
        return "the tokenizer"
    if not weights:
        return None
    if not (folder / "config.json").exists():
        return "config.json"
    absent = [name for name in _weight_files(folder) if not (folder / name).exists()]
    return f"{absent[0]} and {len(absent) - 1} more files" if len(absent) > 1 else next(iter(absent), None)


def _weight_files(folder: Path) -> list[str]:
    """The files with the weights, as transformers chooses them; the first name that it looks for if there are none."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if (folder / stem).exists():
            return [stem]
        if index.exists():
            try:
                return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError):
                return [index.name]
    return ["model.safetensors"]


def has_rows(name: str, hub: HubHome) -> bool:
    """Whether the cache of `datasets` has a copy of a set, at any commit."""
    root = hub.environ.get("HF_DATASETS_CACHE") or str(hub.home / "datasets")
    *owner, last = name.split("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", last)).lower()
    return any((Path(root).expanduser() / "___".join([*owner, snake])).glob("*/*/*/dataset_info.json"))


def is_cached(config: Config, item: Repository, cache: Path) -> bool:
    """Whether the jobs find all of a model in the cache, so that they do not depend on the Hub's answer."""
    weights = item.key == "model.source" and config.model.init is Init.pretrained
    return item.kind == "model" and _missing_of_model(item, cache, weights, config.model.tokenizer is None) is None
