"""Fills in the values of a config that depend on this machine: absolute paths, interpreter, GPU or CPU, precision, shape."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf import resolve
from conf.choices import AdapterKind, Executor, Init, Precision
from conf.schema import Config
from conf.schema_model import Architecture
from conf.schema_training import Adapter
from launcher.check import adapter_source, container_paths, deepspeed_file, fetched_commits, model_files
from launcher.check.cluster_wide import RANKS_ON_CPU
from launcher.check.json_file import read_json
from launcher.check.local_gpus import local_memory_gib
from launcher.check.observe import hub_cache, hub_home, path_exists, without_part
from launcher.estimate import config_json, parameters
from launcher.paths import CLONE


def localize(config: Config, gpus: int) -> None:
    """Change `config` in place to fit this machine, which has `gpus` GPUs.

    - Paths become absolute, because jobs start in another folder. A relative path is tried in the current folder, then in
      the clone of Muster. A value that is neither (a Hub id) stays as it is.
    - `cluster.python` becomes this interpreter. In a container it is `python3`, because this one is not there.
    - In a container, `container.mounts` gets the folders of data and models, and `hf_home` the Hub's cache.
    - With `cluster=local`, `ranks_per_node` of 0 and `gpus_per_node` of null become those of the GPUs that are here.
    - `train.precision=auto` becomes fp32 on CPUs. On GPUs it stays, until a rank sees its GPU (jobs/distributed/precision.py).
    - The file `parallel.deepspeed_config` is read into `parallel.deepspeed`, so that the run folder has its content.
    - The settings of `adapter.source` are taken from its adapter_config.json.
    - `model.architecture` is read from config.json, if that is on this machine and describes a decoder of text.
    - With `cluster.offline`, revisions become the commits that `pipeline=fetch` has downloaded.
    """
    parallel = config.parallel
    _make_paths_absolute(config)
    interpreter = sys.executable if config.cluster.container.image is None else "python3"
    config.cluster.python = config.cluster.python or interpreter
    if config.cluster.container.image is not None:
        container_paths.localize(config)
    if parallel.deepspeed_config:
        parallel.deepspeed = deepspeed_file.merged(deepspeed_file.read(parallel.deepspeed_config), parallel.deepspeed)
        parallel.deepspeed_config = None
    _fit_to_gpus(config, gpus)
    if config.train.precision is Precision.auto and not config.cluster.train.gpus_per_node:
        config.train.precision = Precision.fp32
    if config.adapter.source and config.adapter.kind is not AdapterKind.none and not config.resume:
        adapter_source.take_settings(config)
    if config.model.init is Init.pretrained and config.model.architecture is None:
        config.model.architecture = architecture(config)
    if config.cluster.offline:
        fetched_commits.pin(config, hub_home(config))


def _make_paths_absolute(config: Config) -> None:
    config.run_dir = os.path.abspath(config.run_dir)
    if config.data.cache and not config.data.cache.startswith("$"):
        config.data.cache = os.path.abspath(Path(config.data.cache).expanduser())
    for section, name in (
        (config.data, "path"),
        *((data_set, "path") for data_set in config.data.sets.values()),
        (config.data, "validation_path"),
        (config.data, "chat_template"),
        (config.generate, "prompts"),
        (config.adapter, "source"),
        (config.model, "source"),
        (config.model, "tokenizer"),
        (config.parallel, "deepspeed_config"),
    ):
        value = getattr(section, name)
        if value:
            setattr(section, name, _absolute(value))
    if config.custom.command is not None:
        config.custom.folder = os.path.abspath(Path(config.custom.folder or ".").expanduser())
    if config.tracker.uri and config.tracker.uri.startswith((".", "~")):
        config.tracker.uri = os.path.abspath(Path(config.tracker.uri).expanduser())


def _fit_to_gpus(config: Config, gpus: int) -> None:
    """With `cluster=local`: one rank for each GPU, or ranks on the CPU if there is none; and the memory of the GPUs."""
    if config.cluster.executor is not Executor.local:
        return
    for resources in (config.cluster.train, config.cluster.inference):
        if resources.ranks_per_node == 0:
            wanted = gpus if resources.gpus_per_node is None else resources.gpus_per_node
            resources.ranks_per_node = wanted or RANKS_ON_CPU
        if resources.gpus_per_node is None:  # more ranks than GPUs: refused by launcher/check/rules.py
            resources.gpus_per_node = resources.ranks_per_node if gpus else 0
    train = config.cluster.train
    if train.gpus_per_node and train.gpu_memory_gib is None:
        train.gpu_memory_gib = local_memory_gib()


def architecture(config: Config) -> Architecture | None:
    """The shape of `model.source`, for checks and estimates: as a run in `run_dir` has stored it, else from config.json.

    A run that is launched again keeps what it has: the Hub's cache may have been empty when it was first launched.
    """
    stored = Path(config.run_dir) / "config.yaml"
    if stored.exists() and (earlier := resolve.load(stored)).model.source == config.model.source:
        return earlier.model.architecture
    folder = model_files.find(config.model.source, config.model.revision, hub_cache(config))
    fields, _ = read_json(folder / "config.json") if folder and folder.is_dir() else (None, None)
    shape = config_json.architecture(fields) if fields else None
    if folder and fields and shape and config_json.is_multimodal(fields):
        shape.tower_gib = _tower_gib(folder, fields, shape)
    return shape


def _tower_gib(folder: Path, fields: Mapping[str, Any], shape: Architecture) -> float:
    """GiB of the weights in a folder that are not of the model of text; 0 if the text cannot be counted."""
    counts = parameters.count(shape, Adapter(kind=AdapterKind.none))
    names = [
        section.get(name) for section in (fields, config_json.text_fields(fields)) for name in ("dtype", "torch_dtype")
    ]
    width = 4 if next((name for name in names if name), "") == "float32" else 2
    size = model_files.stored_bytes(folder) - width * counts.total if counts else 0
    return round(max(0, size) / 2**30, 6)


def _absolute(value: str) -> str:
    """The absolute path of an existing file, folder or glob pattern; `value` itself if nothing is there."""
    for path in (Path(value).expanduser(), CLONE / value):
        if path.exists():
            return str(path.resolve())
        if (without := without_part(str(path))) != str(path) and Path(without).exists():
            return str(Path(without).resolve()) + str(path).removeprefix(without)
    if any(sign in value for sign in "*?[") and path_exists(value):
        return os.path.abspath(Path(value).expanduser())
    return value
