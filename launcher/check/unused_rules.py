"""Refuses settings that would change nothing, because another setting leaves them unused; pure."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from conf.choices import AdapterKind, Backend, Executor, Init, Mask, MergeBase, Optimizer, Role
from conf.errors import Problem, as_typed
from conf.schema import Config, Generate, Tracker
from conf.schema_cluster import Container, Resources
from conf.schema_model import Data
from conf.schema_training import Adapter, EarlyStopping, Parallel, Train

SLURM_ONLY = ("gpu_type", "partition", "qos", "constraint", "exclude", "exclusive", "sbatch")
CONTAINER_KEYS = ("runtime", "program", "flags", "mounts")
TRACKER_KEYS = ("project", "entity", "run_name", "group", "tags", "notes", "uri")


def problems(config: Config, typed: Collection[str] = ()) -> Iterator[Problem]:
    """Yield one problem for each setting that is not used, and has another value than its default or is one of the keys `typed`.

    Typing that something is off, or empty, is no problem.
    """
    yield from _adapter(config, typed)
    yield from _layout(config, typed)
    yield from _optimizer(config, typed)
    yield from _training(config, typed)
    yield from _data(config, typed)
    yield from _cluster(config, typed)
    if config.model.init is Init.random and config.model.revision is not None:
        message = "has no effect, because model.init=random reads no weights. Remove it"
        yield Problem("model.revision", config.model.revision, message)
    yield from _tracker(config, typed)


def _set(
    section: Any, schema: type, name: str, keys: tuple[str, ...], why: str, typed: Collection[str]
) -> Iterator[Problem]:
    """A problem for each key of a section that has not its default, or is typed with a value that is not off."""
    usual = defaults(schema)
    for key in keys:
        value = getattr(section, key)
        if value != usual[key] or (f"{name}.{key}" in typed and value not in (None, False, [], {})):
            yield Problem(f"{name}.{key}", _shown(value), f"has no effect, because {why}")


def defaults(schema: type) -> Mapping[str, Any]:
    """The default of each field of a section, as far as it has one."""
    return {
        item.name: item.default_factory() if item.default_factory is not MISSING else item.default
        for item in fields(schema)
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(as_typed(item) for item in value)}]"
    return str(value) if isinstance(value, dict) else as_typed(value)


def _tracker(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    tracker = config.tracker
    if not any((tracker.wandb, tracker.tensorboard, tracker.mlflow, tracker.comet)):
        why = "no tracker is on. Add tracker=wandb, or remove it"
        yield from _set(tracker, Tracker, "tracker", TRACKER_KEYS, why, typed)
        return
    if not tracker.mlflow:
        why = "it is the address of MLflow. Add tracker.mlflow=true, or remove it"
        yield from _set(tracker, Tracker, "tracker", ("uri",), why, typed)
    if not (tracker.wandb or tracker.comet):
        why = "only W&B and Comet have it. Add tracker.wandb=true or tracker.comet=true, or remove it"
        yield from _set(tracker, Tracker, "tracker", ("entity",), why, typed)


def _adapter(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    consolidate = config.consolidate
    if config.adapter.kind is not AdapterKind.none:
        if consolidate.adapter_only and consolidate.base is not MergeBase.original:
            message = "has no effect, because consolidate.adapter_only=true merges nothing. Remove one of them"
            yield Problem("consolidate.base", consolidate.base.name, message)
        return
    why = "adapter.kind=none trains all weights. Add adapter=lora, or remove it"
    yield from _set(config.adapter, Adapter, "adapter", ("r", "alpha", "dropout", "targets"), why, typed)
    if consolidate.adapter_only:
        message = "there is no adapter to write, because adapter.kind=none. Add adapter=lora, or remove it"
        yield Problem("consolidate.adapter_only", True, message)
    if consolidate.base is not MergeBase.original:
        message = "has no effect, because adapter.kind=none. Add adapter=qlora, or remove it"
        yield Problem("consolidate.base", consolidate.base.name, message)


def _layout(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.backend is Backend.zero:
        why = "only FSDP has it. Remove it, or use parallel=fsdp"
        yield from _set(parallel, Parallel, "parallel", ("reshard_after_forward",), why, typed)
        return
    stage = parallel.zero_stage
    remedy = f"Use parallel=zero{stage}" if stage in (1, 2, 3) else "Use parallel=zero1, zero2 or zero3"
    why = f"parallel={parallel.name} shards with FSDP. {remedy}, or remove it"
    yield from _set(parallel, Parallel, "parallel", ("zero_stage", "bucket_elements"), why, typed)
    if parallel.shard_ranks == 1 and parallel.reshard_after_forward:
        message = "has no effect, because parallel.shard_ranks=1 keeps all parameters on each rank. Use parallel=fsdp, or remove it"
        yield Problem("parallel.reshard_after_forward", True, message)


def _optimizer(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    if config.train.optimizer is Optimizer.adafactor:
        why = "train.optimizer=adafactor does not use it. Remove it"
        yield from _set(config.train, Train, "train", ("beta1", "beta2", "eps"), why, typed)


def _training(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    train, generate = config.train, config.generate
    world = config.cluster.train.ranks
    if not train.profile:
        yield from _set(train, Train, "train", ("profile_ranks",), "train.profile=false. Add train.profile=true", typed)
    for rank in train.profile_ranks if train.profile else ():
        if not 0 <= rank < world:
            message = f"training has the ranks 0 to {world - 1}. Name some of these"
            yield Problem("train.profile_ranks", rank, message)
    if train.profile and not train.profile_ranks:
        yield Problem("train.profile_ranks", "[]", "names no rank, so nothing is recorded. Use train.profile_ranks=[0]")
    if train.early_stopping.patience is None and not train.keep_best:
        why = "train.early_stopping.patience=null. Set a patience, or remove it"
        yield from _set(train.early_stopping, EarlyStopping, "train.early_stopping", ("min_delta",), why, typed)
    if train.steps is not None and train.keep_every > train.steps:
        message = f"keeps nothing, because training ends at train.steps={train.steps}. Set train.keep_every=0, or train longer"
        yield Problem("train.keep_every", train.keep_every, message)
    if generate.temperature == 0:
        why = "generate.temperature=0 takes the most likely token. Set generate.temperature=0.7, or remove it"
        yield from _set(generate, Generate, "generate", ("seed",), why, typed)


def _data(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    data = config.data
    if data.mask is Mask.all and data.train_on != [Role.assistant]:
        message = "has no effect, because data.mask=all trains every turn. Use data.mask=assistant, or remove it"
        yield Problem("data.train_on", _shown(data.train_on), message)
    if data.validation_path is not None and data.validation_fraction:
        why = "data.validation_path has the validation rows. Remove one of them"
        yield from _set(data, Data, "data", ("validation_fraction",), why, typed)
    for name, data_set in data.sets.items():
        if data_set.num_samples is not None and data_set.weight != 1:
            message = f"has no effect, because data.sets.{name}.num_samples={data_set.num_samples} is used instead. Set one of them"
            yield Problem(f"data.sets.{name}.weight", data_set.weight, message)


def _cluster(config: Config, typed: Collection[str]) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.executor is Executor.local:
        why = "cluster=local does not use Slurm. Use cluster=slurm, or remove it"
        for section in ("train", "cpu", "inference"):
            yield from _set(getattr(cluster, section), Resources, f"cluster.{section}", SLURM_ONLY, why, typed)
        if cluster.account is not None:
            yield Problem("cluster.account", cluster.account, f"has no effect, because {why}")
        if cluster.srun_args:
            yield Problem("cluster.srun_args", _shown(cluster.srun_args), f"has no effect, because {why}")
    if cluster.container.image is None:
        why = "cluster.container.image=null runs jobs without a container. Set the image, or remove it"
        yield from _set(cluster.container, Container, "cluster.container", CONTAINER_KEYS, why, typed)
