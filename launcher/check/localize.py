"""Fits cluster=local to the GPUs of this machine."""

import os
import sys
from pathlib import Path

from conf.choices import Container, Executor, Precision
from conf.schema import Config
from launcher.check.observe import _matches, local_memory_gib
from launcher.paths import CLONE


def localise(config: Config, gpus: int) -> None:
    """Settle what depends on this machine: absolute paths (tried here, then in the clone), interpreter, GPU or CPU, precision."""
    config.run_dir = os.path.abspath(config.run_dir)
    if config.data.cache:
        config.data.cache = os.path.abspath(Path(config.data.cache).expanduser())
    config.cluster.python = config.cluster.python or (
        "python3" if config.cluster.container is not Container.none else sys.executable
    )
    for section, name in (
        (config.data, "path"),
        *((one, "path") for one in config.data.sets.values()),
        (config.data, "validation_path"),
        (config.data, "chat_template"),
        (config.generate, "prompts"),
        (config.model, "source"),
        (config.model, "tokenizer"),
    ):
        value = getattr(section, name)
        candidates = (Path(value).expanduser(), CLONE / value) if value else ()
        found = next((str(path.resolve()) for path in candidates if path.exists()), value)
        if found and any(sign in found for sign in "*?[") and _matches(found):
            found = os.path.abspath(Path(found).expanduser())  # jobs start elsewhere
        setattr(section, name, found)
    for part in (config.cluster.train, config.cluster.inference):
        if part.gpus_per_node is None:
            part.gpus_per_node = part.ranks_per_node if gpus >= part.ranks_per_node else 0
    part = config.cluster.train
    if config.cluster.executor is Executor.local and part.gpus_per_node and part.gpu_memory_gib is None:
        part.gpu_memory_gib = local_memory_gib()
    if config.train.precision is Precision.auto:
        config.train.precision = Precision.bf16 if config.cluster.train.gpus_per_node else Precision.fp32
