"""Compares DeepSpeed's own settings (`parallel.deepspeed`) with Muster's keys, which decide what is trained; pure."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from enum import Enum
from typing import Any

from conf import deepspeed
from conf.choices import Backend
from conf.deepspeed import ANY, COUNT, NUMBER, PRECISION, SWITCH, TUNABLE
from conf.errors import Problem, as_typed
from conf.resolve import flat
from conf.schema import Config
from conf.schema_training import Parallel
from launcher.convert.keys import Outcome
from launcher.convert.sharding_keys import DEEPSPEED

KEY = "parallel.deepspeed"
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
ROWS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DECIDED_BY = {
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
    "zero_optimization.offload_param.device": "parallel.offload_parameters",
}
"""Keys whose `false` or `none` names no value of Muster's key."""

INSTEAD = {
    "activation_checkpointing": "Set train.activation_checkpointing instead",
    "aio": "Muster offloads to host memory, not to disks. Remove it",
    "pipeline": "Muster has no pipeline parallelism. Remove it",
    "tensor_parallel": "Use parallel=fsdp with parallel.tensor_ranks instead",
    "tensorboard": "Use tracker=tensorboard instead",
    "wandb": "Use tracker=wandb instead",
    "comet": "Use tracker=comet instead",
}
"""Section of DeepSpeed -> what to use."""


def problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Each setting that DeepSpeed does not have or Muster does not pass on, that is no valid value, or that a key contradicts."""
    mine = {key: value for key, value in flat(config.parallel.deepspeed).items() if value not in ("auto", {}, None)}
    if mine and config.parallel.backend is not Backend.zero:
        message = (
            "has settings of DeepSpeed, which parallel.backend=fsdp does not use. Use parallel=zero3, or remove them"
        )
        yield Problem(KEY, None, message)
        return
    plain = replace(config, parallel=replace(config.parallel, deepspeed={}))
    ours = flat(deepspeed.deepspeed_config(plain, world_size)) if mine else {}
    messages = {key: _message(key, value, config, ours) for key, value in mine.items()}
    yield from (Problem(f"{KEY}.{key}", mine[key], message) for key, message in messages.items() if message)


def _message(key: str, value: Any, config: Config, ours: Mapping[str, Any]) -> str | None:
    if deepspeed.is_tunable(key):
        return _wrong_value(key, value) or _without_effect(key, value, config.parallel)
    if key in ROWS:
        return _rows(key, value, config, ours)
    if key in ours and ours[key] == value:
        return None
    if key in DEEPSPEED:
        return _decided(key, value, config)
    if key in ours:
        return f"Muster sets it to {as_typed(ours[key])}. Remove it"
    known = [name for name in (*TUNABLE, *DEEPSPEED, *ours) if not name.endswith("*")]
    near = get_close_matches(key, known, n=1, cutoff=0.88)
    hint = f". Did you mean {near[0]}?" if near else f". {INSTEAD.get(key.split('.')[0], 'Remove it')}"
    return f"is no setting that Muster passes to DeepSpeed{hint}"


def _wrong_value(key: str, value: Any) -> str | None:
    kind = TUNABLE.get(key, ANY)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        COUNT: number and value >= 0 and value % 1 == 0,
        NUMBER: number and 0 <= value < float("inf"),
        SWITCH: isinstance(value, bool),
        PRECISION: value in ("fp32", "fp16", "bf16"),
        ANY: True,
    }
    return None if fits[kind] else f"must be {kind}"


def _without_effect(key: str, value: Any, parallel: Parallel) -> str | None:
    """A setting of offload where nothing is offloaded, or a bucket that `parallel.bucket_elements` also sets."""
    section, _, name = key.rpartition(".")
    for part, ours in (("offload_param", "offload_parameters"), ("offload_optimizer", "offload_optimizer")):
        if section == f"zero_optimization.{part}" and not getattr(parallel, ours):
            return f"needs parallel.{ours}=true. Set it, or remove this"
    if name in BUCKETS and parallel.bucket_elements not in (Parallel.bucket_elements, value):
        return f"says the same as parallel.bucket_elements={parallel.bucket_elements}. Set one of them"
    return None


def _rows(key: str, value: Any, config: Config, ours: Mapping[str, Any]) -> str | None:
    """Rows of a batch: DeepSpeed's three numbers follow from two keys of Muster."""
    train = config.train
    if key != "train_batch_size" and train.micro_batch is None:
        wanted = value if key == "train_micro_batch_size_per_gpu" else "..."
        return f"Muster chooses it, because train.micro_batch=null. Set train.micro_batch={wanted}, or write auto here"
    if value == ours[key]:
        return None
    by = f"train.global_batch={train.global_batch}" + (
        f" and train.micro_batch={train.micro_batch}" if train.micro_batch else ""
    )
    return f"{by} make it {ours[key]}. Change these, or write auto here"


def _decided(key: str, value: Any, config: Config) -> str | None:
    """A key of Muster decides this: what must be set there, or None if it is."""
    if key == "zero_optimization.stage":
        remedy = "parallel=ddp" if value == 0 else f"parallel=zero{value}"
        return f"parallel.zero_stage={config.parallel.zero_stage} decides this. Use {remedy}, or write auto here"
    try:
        row = DEEPSPEED[key](key, value, {})
    except (TypeError, ValueError):
        return "is not a valid value. Write auto here: Muster's own keys decide this"
    if row.outcome is Outcome.refused:
        return f"{row.why}. Remove it"
    differing = {name: wanted for name, wanted in row.ours.items() if _differ(_value(config, name), wanted)}
    if differing:
        current = ", ".join(f"{name}={as_typed(_value(config, name))}" for name in differing)
        wanted = " ".join(f"{name}={as_typed(wanted)}" for name, wanted in differing.items())
        return f"{current} decides this. Set {wanted}, or write auto here"
    if row.ours:
        return None
    name = DECIDED_BY.get(key)
    return (
        f"{name}={as_typed(_value(config, name))} decides this. Write auto here"
        if name
        else "Muster sets it. Remove it"
    )


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _differ(current: Any, wanted: Any) -> bool:
    return bool((current.name if isinstance(current, Enum) else current) != wanted)
