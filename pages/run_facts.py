"""Names what a run is made of for the pages: model, tokenizer, chat template, data, and the settings that people compare."""

import time
from pathlib import Path

from conf.batch import split
from conf.choices import AdapterKind
from conf.files import read_json
from conf.plural import plural
from conf.schedule import warmup_steps
from conf.schema import Config

Fact = tuple[str, str]
"""(name, text)."""


def model(config: Config) -> list[Fact]:
    """The model, its tokenizer and the chat template."""
    name, source = config.model.name, config.model.source
    begins = "random weights" if config.model.init.name == "random" else f"from {source}"
    return [
        ("model", f"{name}, {begins}"),
        ("tokenizer", config.model.tokenizer or source),
        ("chat template", config.data.chat_template or "the tokenizer's own"),
    ]


def data(config: Config) -> Fact:
    """The data of the run, with what preprocess has counted."""
    described = read_json(Path(config.run_dir) / "data" / "data.json") or {}
    names = ", ".join(described.get("sets", {})) or config.data.name
    text = f"{names} ({config.data.path})" if config.data.path else names
    if train := described.get("train"):
        held_out = described["validation"]["samples"]
        text += f"; {plural(train['samples'], 'sample')}, {plural(train['tokens'], 'token')}, {held_out:,} held out"
    return ("data", text)


def settings(config: Config, ranks: int, steps: int) -> list[Fact]:
    """What people look for when they compare runs. ranks: of the training. steps: how many it has."""
    train, micro = config.train, split(config, ranks)
    schedule = f"{train.learning_rate:g} peak, {train.lr_schedule.name}, {warmup_steps(train, steps)} steps of warmup"
    rows = f"{plural(train.global_batch, 'row')} a step: micro batches of {micro[0]}, {micro[1]} accumulated"
    packing = ", packed" if config.data.packing else ""
    return [
        ("learning rate", schedule),
        ("batch", rows),
        ("max_length", f"{plural(config.data.max_length, 'token')}{packing}"),
        (
            "optimizer",
            f"{train.optimizer.name}, weight decay {train.weight_decay:g}, clipped to {train.max_grad_norm:g}",
        ),
        ("precision", train.precision.name),
        ("layout", config.parallel.name),
        ("adapter", _adapter(config)),
        ("seed", str(train.seed)),
    ]


def _adapter(config: Config) -> str:
    adapter = config.adapter
    if adapter.kind is AdapterKind.none:
        return "none: all weights are trained"
    return f"{adapter.kind.name}, r {adapter.r}, alpha {adapter.alpha:g}, base {adapter.base.name}"


def moment(seconds: float) -> str:
    """A time, in seconds since 1970, with the zone of this machine."""
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def config_text(config: Config) -> str:
    """RUN/config.yaml; empty if it cannot be read."""
    try:
        return (Path(config.run_dir) / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
