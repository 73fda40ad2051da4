"""The rules that a whole config must keep; pure. Every rule yields problems, and all of them are reported at once."""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from conf.batch import copies
from conf.choices import AdapterKind, Attention, Backend, Container, Executor, Format, Init, Submit
from conf.columns import INPUT, INSTRUCTION, MESSAGES, OUTPUT, SPLIT
from conf.datasets import training
from conf.errors import Problem
from conf.jobs import JOB_KINDS
from conf.schema import Config, DataSet
from launcher.check import combinations
from launcher.check.observe import Facts, FirstRow
from launcher.estimate import auto_settings, memory, suggest, table
from launcher.plan import resources
from launcher.secret_names import is_secret

COLUMNS = {
    Format.alpaca: [{asked, answered} for asked in (*INSTRUCTION, *INPUT) for answered in OUTPUT],
    Format.sharegpt: [{name} for name in reversed(MESSAGES)],
    Format.messages: [{name} for name in MESSAGES],
    Format.prompt_completion: [{"prompt", "completion"}],
    Format.segments: [{"segments"}],
    Format.text: [{"text"}],
    Format.tokenised: [{"input_ids"}],
}
"""What each format may look like: looked at here so that a wrong file is refused before anything is queued."""


def problems(config: Config, facts: Facts) -> list[Problem]:
    """Everything wrong with the config on this site; empty when the run can be submitted."""
    found = list(_values(config))
    sizes = () if found else (_batch, _layout, _shared, _devices, _memory)  # they divide by numbers that may be 0
    rules = (_names, _steps, *sizes, _pairs, _model, _data, _site, _time, _secrets, _run_folder)
    return found + [problem for rule in rules for problem in rule(config, facts)]


def _values(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Each value by itself: numbers within their bounds, no text empty."""
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        elif "section" in item.metadata:
            for name, entry in value.items():
                yield from _values(entry, f"{key}.{name}.")
        elif value == "":
            yield Problem(key, value, "is empty; null leaves an optional value out")
        elif item.metadata and value is not None and not item.metadata["minimum"] <= value <= item.metadata["maximum"]:
            bound = f"at least {item.metadata['minimum']:g}"
            if item.metadata["maximum"] < math.inf:
                bound += f" and at most {item.metadata['maximum']:g}"
            yield Problem(key, value, f"must be {bound}")


def _names(config: Config, _: Facts) -> Iterator[Problem]:
    if not re.fullmatch(r"[\w.+-]*", config.name):
        yield Problem(
            "name", config.name, "may have letters, digits, '.', '_', '+' and '-' only: it names jobs and folders"
        )
    if not config.run_dir.isprintable() or "%" in config.run_dir:
        yield Problem(
            "run_dir", repr(config.run_dir), "may not have control characters, nor %, which Slurm would expand"
        )
    for job in config.jobs:
        if job not in JOB_KINDS:
            yield Problem("jobs", job, f"no such job; there are {', '.join(JOB_KINDS)}")
    if not config.jobs:
        yield Problem("jobs", "[]", "name at least one job, or take a pipeline, such as pipeline=finetune")


def _steps(config: Config, _: Facts) -> Iterator[Problem]:
    if config.train.steps is None and config.train.epochs is None:
        yield Problem("train.steps", "null", "give train.steps or train.epochs")
    if config.train.steps is not None and config.train.warmup_steps >= config.train.steps:
        yield Problem(
            "train.warmup_steps", config.train.warmup_steps, f"must be below train.steps={config.train.steps}"
        )


def _batch(config: Config, _: Facts) -> Iterator[Problem]:
    world, rows = config.cluster.train.nodes * config.cluster.train.ranks_per_node, config.train.global_batch
    world //= math.gcd(world, copies(config))  # where they do not divide the ranks, `_layout` says so
    if rows % world:
        nearest = " or ".join(str(count * world) for count in (rows // world, rows // world + 1) if count)
        yield Problem(
            "train.global_batch", rows, f"is not divisible by the {world} ranks of cluster.train: take {nearest}"
        )


def _layout(config: Config, _: Facts) -> Iterator[Problem]:
    parallel, part = config.parallel, config.cluster.train
    world = part.nodes * part.ranks_per_node
    if parallel.backend is Backend.zero:
        if parallel.zero_stage not in (1, 2, 3):
            yield Problem("parallel.zero_stage", parallel.zero_stage, "must be 1, 2 or 3; parallel=ddp does not shard")
        if parallel.offload_parameters and parallel.zero_stage != 3:
            yield Problem(
                "parallel.offload_parameters", True, "needs parallel.zero_stage=3: only there are parameters sharded"
            )
        if parallel.shard_ranks is not None:
            yield Problem(
                "parallel.shard_ranks", parallel.shard_ranks, "is for FSDP; ZeRO always shards over all ranks"
            )
        if parallel.tensor_ranks > 1:
            yield Problem("parallel.tensor_ranks", parallel.tensor_ranks, "is for FSDP: take parallel=fsdp, or 1")
    elif part.ranks_per_node % parallel.tensor_ranks:
        said = f"does not divide the {part.ranks_per_node} ranks of a node: they exchange at every matrix"
        yield Problem("parallel.tensor_ranks", parallel.tensor_ranks, said)
    elif world // parallel.tensor_ranks % (parallel.shard_ranks or 1):
        of = f"the {world} ranks of cluster.train"
        of += f" over {parallel.tensor_ranks} tensor_ranks" if parallel.tensor_ranks > 1 else ""
        yield Problem("parallel.shard_ranks", parallel.shard_ranks, f"does not divide {of}")
    elif parallel.offload_optimizer != parallel.offload_parameters:
        yield Problem(
            "parallel.offload_optimizer",
            parallel.offload_optimizer,
            "FSDP keeps optimizer state where the parameters are: set both offload_* to the same",
        )


def _shared(config: Config, _: Facts) -> Iterator[Problem]:
    """Rows and matrices that several ranks share."""
    parallel, part, shape = config.parallel, config.cluster.train, config.model.architecture
    if part.nodes * part.ranks_per_node % copies(config):
        said = f"times parallel.tensor_ranks={parallel.tensor_ranks} does not divide the ranks of cluster.train"
        yield Problem("parallel.context_ranks", parallel.context_ranks, said)
    if parallel.context_ranks > 1 and config.model.attention not in (
        Attention.auto,
        Attention.cudnn,
        Attention.varlen,
    ):
        said = f"cannot share rows over parallel.context_ranks={parallel.context_ranks}: take auto"
        yield Problem("model.attention", config.model.attention.name, said)
    if shape:
        for key in ("context_ranks", "tensor_ranks"):
            ranks = getattr(parallel, key)
            few = shape.num_key_value_heads if key == "tensor_ranks" else shape.num_attention_heads
            if few % ranks:
                yield Problem(f"parallel.{key}", ranks, f"does not divide the model's {few} heads that are shared out")
    if parallel.tensor_ranks > 1 and config.adapter.kind is not AdapterKind.none:
        yield Problem(
            "parallel.tensor_ranks", parallel.tensor_ranks, "trains whole models only: take adapter=none, or 1"
        )


def _devices(config: Config, facts: Facts) -> Iterator[Problem]:
    local = config.cluster.executor is Executor.local
    for name in ("train", "cpu", "inference"):
        part = getattr(config.cluster, name)
        key = f"cluster.{name}"
        if local and part.nodes > 1:
            yield Problem(f"{key}.nodes", part.nodes, "cluster=local has one node; take cluster=slurm for more")
        if part.gpus_per_node is None:
            yield Problem(
                f"{key}.gpus_per_node", "null", "give a number: only cluster=local can look for GPUs by itself"
            )
        elif local and part.gpus_per_node > facts.gpus:
            yield Problem(
                f"{key}.gpus_per_node",
                part.gpus_per_node,
                f"this machine has {facts.gpus}: set it to 0 to run on the CPU",
            )
        elif name == "train" and part.gpus_per_node and part.gpus_per_node != part.ranks_per_node:
            yield Problem(
                f"{key}.ranks_per_node",
                part.ranks_per_node,
                f"must equal cluster.train.gpus_per_node={part.gpus_per_node}: one rank drives one GPU",
            )
    for name in config.jobs:
        if name in JOB_KINDS and JOB_KINDS[name].section == "inference":
            part = resources(config, name)
            if part.nodes * part.ranks_per_node > 1:
                yield Problem(
                    f"cluster of {name}", part.nodes * part.ranks_per_node, f"{name} is one process: one node, one rank"
                )


def _memory(config: Config, facts: Facts) -> Iterator[Problem]:
    """An estimate, so it speaks only where the site says what its GPUs have; and of nothing that is wrong already."""
    capacity = config.cluster.train.gpu_memory_gib
    if capacity is None or "train" not in config.jobs:
        return
    if any(True for rule in (_batch, _layout) for _ in rule(config, facts)):
        return
    config, _ = auto_settings.settled(config)
    found = memory.estimate(config)
    if found and found.on_gpu and found.device.total > capacity * table.GIB:
        other = suggest.that_fits(config, capacity) or "no layout, batch or number of nodes near yours would do"
        yield Problem("cluster.train.gpu_memory_gib", capacity, f"train needs {table.device_line(found)}: {other}")


def _pairs(config: Config, _: Facts) -> Iterator[Problem]:
    return combinations.problems(config)


def _model(config: Config, _: Facts) -> Iterator[Problem]:
    if config.model.init is Init.random and config.model.architecture is None:
        yield Problem("model.architecture", None, "is needed to build model.init=random")
    if config.data.packing and config.model.attention is Attention.cudnn:
        yield Problem("model.attention", "cudnn", "does not keep the samples of packed rows apart: take auto or varlen")
    if config.adapter.kind is AdapterKind.lora and config.model.init is Init.random and "consolidate" in config.jobs:
        yield Problem(
            "adapter.kind",
            "lora",
            "an adapter of random weights has no base to be merged into: "
            "name a model folder or Hub id with model.init=pretrained, or leave consolidate out of jobs",
        )


def _data(config: Config, facts: Facts) -> Iterator[Problem]:
    for key, value in facts.files_missing:
        yield Problem(key, value, "no such file or folder, here or in Muster's own folder")
    if (config.data.path is None) == (not config.data.sets):
        yield Problem("data.path", config.data.path, "name the rows: data.path=..., or several data.sets.NAME.path=...")
        return
    for name in training(config.data):
        if not re.fullmatch(r"\w[\w.-]*", name):
            key = f"data.sets.{name}" if config.data.path is None else "data.name"
            yield Problem(key, name, "may have letters, digits, '.', '_' and '-' only: it names a folder")
    splits = {"data.split": config.data.split, "data.validation_split": config.data.validation_split}
    for key, split in (
        splits | {f"data.sets.{name}.split": one.split for name, one in config.data.sets.items()}
    ).items():
        if split is not None and not SPLIT.fullmatch(split):
            yield Problem(key, split, "is not a part of rows: write [:1000], [10%:] or [-100:]")
    for seen, one in zip(facts.first_rows, training(config.data).values(), strict=False):
        if seen.error:
            yield Problem(seen.key, one.path, seen.error)
        if seen.columns is not None and not one.fields:
            yield from _columns(seen, one)


def _columns(seen: FirstRow, one: DataSet) -> Iterator[Problem]:
    """Whether a set's first row can be of its format."""
    assert seen.columns is not None
    asked = [one.format] if one.format not in (None, Format.auto) else list(COLUMNS)
    if not any(shape <= set(seen.columns) for format in asked for shape in COLUMNS[format]):
        wanted = "; ".join(f"{format.name} needs {' and '.join(sorted(COLUMNS[format][0]))}" for format in asked)
        yield Problem(
            seen.key, one.path, f"has the columns {', '.join(seen.columns)}, but {wanted}: map them with data.fields"
        )


def _site(config: Config, facts: Facts) -> Iterator[Problem]:
    if (
        config.cluster.executor is Executor.slurm
        and not config.dry_run
        and config.submit is Submit.submitit
        and facts.slurm_missing
    ):
        yield Problem(
            "cluster",
            config.cluster.name,
            f"Slurm's {facts.slurm_missing[0]} is not on PATH: run this on a login node, "
            "look with dry_run=true, write scripts with submit=script, or take cluster=local",
        )
    if config.cluster.executor is Executor.local and config.submit is Submit.script:
        yield Problem("submit", "script", "writes sbatch scripts: take cluster=slurm")
    if (config.cluster.container is Container.none) != (config.cluster.container_image is None):
        yield Problem(
            "cluster.container_image", config.cluster.container_image, "goes with cluster.container=apptainer or pyxis"
        )


def _time(config: Config, _: Facts) -> Iterator[Problem]:
    warned, limit = config.cluster.signal_s, config.cluster.train.time_min * 60
    if "train" in config.jobs and warned >= limit:
        yield Problem(
            "cluster.signal_s",
            warned,
            f"is no less than cluster.train.time_min={config.cluster.train.time_min} ({limit} s), so training would be told to "
            "stop before its first step: ask for more time, or lower cluster.signal_s to what a checkpoint takes",
        )


def _secrets(config: Config, facts: Facts) -> Iterator[Problem]:
    for key, value in config.cluster.environment.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            yield Problem(f"cluster.environment.{key}", None, "is no name of a variable: letters, digits and _ only")
        if is_secret(key) and value:
            yield Problem(
                f"cluster.environment.{key}",
                "(hidden)",
                f"would be written to files: name it in cluster.secrets=[{key}] instead",
            )
    if not config.dry_run:
        for name in facts.secrets_missing:
            yield Problem("cluster.secrets", name, f"export {name} first, or put it into {config.cluster.secrets_file}")


def _run_folder(config: Config, facts: Facts) -> Iterator[Problem]:
    if facts.run_dir_error:
        yield Problem("run_dir", config.run_dir, facts.run_dir_error)
