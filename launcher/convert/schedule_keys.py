"""Rules for schedules, optimizers and steps of a Trainer: when it evaluates and saves, and how the learning rate falls."""

from collections.abc import Mapping
from typing import Any

import yaml

from launcher.convert.keys import (
    Outcome,
    Row,
    Rule,
    choice,
    described,
    joined,
)

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"train.lr_schedule": "linear"},
    "cosine": {"train.lr_schedule": "cosine"},
    "cosine_with_restarts": {"train.lr_schedule": "cosine_restarts", "train.lr_cycles": 1},
    "polynomial": {"train.lr_schedule": "polynomial"},
    "constant": {"train.lr_schedule": "constant"},
    "constant_with_warmup": {"train.lr_schedule": "constant_with_warmup"},
    "inverse_sqrt": {"train.lr_schedule": "inverse_sqrt"},
    "cosine_with_min_lr": {"train.lr_schedule": "cosine"},
    "warmup_stable_decay": {"train.lr_schedule": "wsd"},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("adamw", "adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_apex_fused", "adamw_torch_npu_fused", "fused"),
        {"train.optimizer": "adamw"},
    ),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "ao_adamw_8bit"), {"train.optimizer": "adamw_8bit"}
    ),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), {"train.optimizer": "paged_adamw"}),
    "paged_adamw_8bit": {"train.optimizer": "paged_adamw_8bit"},
    "muon": {"train.optimizer": "muon"},
}
NEAR_OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw_torch_4bit", "ao_adamw_4bit"), ("adamw_8bit", "8 bits are the fewest that Muster's AdamW has")
    ),
    "adafactor": ("adafactor", "its learning rate is relative to the size of a weight: set train.learning_rate=1e-3"),
    "ao_adamw_fp8": ("adamw_8bit", "the state in 8 bits with block scales, not in float8"),
    **dict.fromkeys(
        ("optimi_adamw", "flash_adamw", "adamw_anyprecision"), ("adamw", "the same algorithm, with an fp32 state")
    ),
}
"""Optimizers to which one of Muster's comes near: its name, and what differs."""
OTHER_SCHEDULE = (
    "Muster has train.lr_schedule=cosine, linear, constant, wsd, inverse_sqrt, polynomial and cosine_restarts"
)
OTHER_OPTIMIZER = "Muster has train.optimizer=adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adafactor and muon"
_OPTIMIZER = choice(OPTIMIZERS, OTHER_OPTIMIZER)


@described(_OPTIMIZER.description)
def optimizer(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if str(value).lower() in NEAR_OPTIMIZERS:
        name, why = NEAR_OPTIMIZERS[str(value).lower()]
        return Row(key, value, Outcome.changed, {"train.optimizer": name}, why)
    return _OPTIMIZER(key, value, config)


@described("`train.lr_cycles`, `train.lr_power`, `train.min_lr_ratio`, `train.decay_ratio`")
def schedule_options(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    """`lr_scheduler_kwargs`: the options that Muster's schedules have."""
    if isinstance(value, str):
        value = yaml.safe_load(value)
    if not isinstance(value, Mapping):
        return Row(key, value, Outcome.refused, why="must be a section with keys")
    return joined(key, value, [_schedule_option(name, item, config) for name, item in value.items()])


def _schedule_option(name: str, value: Any, config: Mapping[str, Any]) -> Row:
    same = {
        "num_cycles": "train.lr_cycles",
        "power": "train.lr_power",
        "min_lr_rate": "train.min_lr_ratio",
        "min_lr_ratio": "train.min_lr_ratio",
    }
    if name in same and not (name == "num_cycles" and float(value) != int(value)):
        return Row(name, value, Outcome.kept, {same[name]: int(value) if name == "num_cycles" else float(value)})
    if name in ("min_lr", "lr_end") and config.get("learning_rate"):
        ratio = float(value) / float(config["learning_rate"])
        return Row(name, value, Outcome.kept, {"train.min_lr_ratio": ratio}, "as a share of the peak")
    steps = int(config.get("max_steps") or 0)
    if name == "num_decay_steps" and steps > 0:
        return Row(name, value, Outcome.kept, {"train.decay_ratio": int(value) / steps}, "as a share of all steps")
    if name == "num_stable_steps":
        return Row(name, value, Outcome.unneeded, why="the steps between warmup and decay")
    if name == "decay_type" and value == "cosine":
        return Row(name, value, Outcome.unneeded, why="Muster's wsd falls in a cosine")
    why = "has no counterpart. Muster has train.lr_cycles, lr_power, min_lr_ratio and decay_ratio"
    return Row(name, value, Outcome.refused, why=why)


def interval(every: str, per_epoch: str) -> Rule:
    """Steps between evaluations or saves: whole steps, or a share of the training."""

    @described(f"`{every}`, or `{per_epoch}`")
    def rule(key: str, value: Any, config: Mapping[str, Any]) -> Row:
        strategy = key.replace("_steps", "_strategy")
        if config.get(strategy, config.get("evaluation_strategy") if key == "eval_steps" else None) == "epoch":
            return Row(key, value, Outcome.unneeded, why=f"{strategy} is epoch")
        if value is False or float(value) >= 1 or float(value) == 0:
            return Row(key, value, Outcome.kept, {every: int(value)})
        epochs = float(config.get("num_train_epochs") or config.get("num_epochs") or 1)
        times = max(1, round(1 / (float(value) * epochs)))
        return Row(key, value, Outcome.changed, {per_epoch: times}, "a share of the training, as times in an epoch")

    return rule


def strategy(every: str, per_epoch: str) -> Rule:
    """`eval_strategy` and `save_strategy`."""
    options = {"no": {every: 0}, "false": {every: 0}, "epoch": {per_epoch: 1}, "steps": {}}
    if every == "train.save_every":
        options["best"] = {every: 0, "train.keep_best": True}
    return choice(options, "Muster evaluates and saves in steps, or evenly in each epoch")


@described("`train.warmup_ratio`")
def warmup_ratio(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if config.get("warmup_steps"):
        return Row(key, value, Outcome.unneeded, why="warmup_steps counts, as in a Trainer")
    return Row(key, value, Outcome.kept, {"train.warmup_ratio": value})


@described("`train.warmup_steps`")
def warmup_steps(key: str, value: Any, config: Mapping[str, Any]) -> Row:
    if not value and config.get("warmup_ratio"):
        return Row(key, value, Outcome.unneeded, why="warmup_ratio counts, as in a Trainer")
    if 0 < float(value) < 1:
        return Row(key, value, Outcome.kept, {"train.warmup_ratio": value})
    return Row(key, value, Outcome.kept, {"train.warmup_steps": int(value)})


@described("`train.steps`")
def max_steps(key: str, value: Any, _: Mapping[str, Any]) -> Row:
    if int(value) <= 0:
        return Row(key, value, Outcome.unneeded, why="asks for nothing")
    return Row(key, value, Outcome.kept, {"train.steps": int(value)})
