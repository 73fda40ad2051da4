"""Checks a whole config against every rule and reports all problems at once; pure.

Rules of a site are in `site_rules.py`, those of layout and batch size in `parallel_rules.py`, those of training data in
`data_rules.py`, those of the model's files in `model_rules.py`, those of packed rows in `packing_rules.py`, those of options that
do not work together in `combinations.py`, those of texts in `text_rules.py`, those of secrets in `secret_rules.py`, those of the
Hub in `hub_rules.py`, those of what would fail or be ignored later in `later_failures.py`. All others are here.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from conf import text
from conf.choices import AdapterKind, Attention, Executor, Init, Schedule, Submit
from conf.errors import Problem
from conf.held_out import BEST
from conf.jobs import JOB_KINDS, RESUMABLE
from conf.plural import plural
from conf.schema import Config
from conf.schema_training import Train
from launcher import plan
from launcher.check import (
    combinations,
    data_rules,
    deepspeed_rules,
    hub_rules,
    later_failures,
    model_rules,
    packing_rules,
    parallel_rules,
    program_rules,
    secret_rules,
    site_rules,
    sweep_rules,
    text_rules,
)
from launcher.check.observe import Facts
from launcher.estimate import auto_settings, memory, suggest, table

LEAST_SHOWN = 1e-4
"""A lower bound below this only keeps 0 out, so a message says `above 0`."""


def problems(config: Config, facts: Facts) -> list[Problem]:
    """Everything that is wrong with the config on this site. An empty list means that the run can be submitted.

    The config must have been localized (`launcher.check.localize`); `facts` are what `launcher.check.observe` saw.
    """
    stored = set(_values(facts.existing)) if facts.existing else set()  # a started run keeps what it has
    out_of_bounds = [problem for problem in _values(config) if problem not in stored]
    reported = [*out_of_bounds, *text.problems(config), *text_rules.problems(config)]
    reported += [*_jobs(config), *_steps(config), *_schedule(config), *_held_out(config)]
    if not out_of_bounds:  # these divide by numbers that could be 0
        own_batch = config.custom.command is not None
        bad_layout = [*(() if own_batch else parallel_rules.batch(config)), *parallel_rules.layout(config)]
        reported += [*bad_layout, *parallel_rules.shared_rows_and_matrices(config), *_devices(config, facts)]
        if not bad_layout:
            world_size = config.cluster.train.ranks
            bad_settings = list(deepspeed_rules.problems(config, world_size))
            # an estimate of a wrong layout says nothing
            reported += bad_settings or _memory(config)
        reported += later_failures.problems(config, facts)
    reported += program_rules.problems(config)
    reported += [*combinations.problems(config), *_model(config), *data_rules.problems(config, facts)]
    reported += model_rules.problems(config, facts.model, facts.families)
    reported += packing_rules.problems(config, facts.model, facts.kernels)
    reported += hub_rules.problems(config, facts.hub)
    reported += [*facts.packages_missing, *_site(config, facts), *site_rules.problems(config), *_signal(config)]
    reported += sweep_rules.problems(config)
    reported += secret_rules.problems(config, facts)
    return [*reported, *_run_folder(config, facts)]


def _values(section: Any, prefix: str = "") -> Iterator[Problem]:
    """Each value by itself: a number must be within its bounds, a string must not be empty."""
    hints = get_type_hints(type(section))
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from _values(value, f"{key}.")
        elif "section" in item.metadata:
            for name, entry in value.items():
                yield from _values(entry, f"{key}.{name}.")
        elif value == "":
            yield Problem(key, value, "must not be empty. Use null to leave an optional value unset")
        elif (
            value == []
            and item.default_factory is not list  # where an empty list is the default, it means something
            and (choices := getattr(get_args(hints[item.name])[0], "__members__", None))
        ):
            yield Problem(key, "[]", f"must not be empty. Name at least one of {', '.join(choices)}")
        elif "minimum" in item.metadata and value is not None:
            yield from _bounds(key, value, item.metadata["minimum"], item.metadata["maximum"])


def _bounds(key: str, value: float, minimum: float, maximum: float) -> Iterator[Problem]:
    if minimum <= value <= maximum and value != math.inf:
        return
    lower = f"at least {minimum:g}" if minimum == 0 or minimum >= LEAST_SHOWN else "above 0"
    upper = f" and at most {maximum:.15g}" if maximum < math.inf else ""
    yield Problem(key, value, f"must be {lower}{upper}" + (" and finite" if value == math.inf else ""))


def _jobs(config: Config) -> Iterator[Problem]:
    for job in config.jobs:
        if job not in JOB_KINDS:
            yield Problem("jobs", job, f"no such job. Choose from {', '.join(JOB_KINDS)}")
    for job in {job for job in config.jobs if config.jobs.count(job) > 1}:
        yield Problem("jobs", job, "is named more than once. Name each job once: it runs once")
    if not config.jobs:
        yield Problem("jobs", "[]", "must name at least one job. Use a pipeline, for example pipeline=finetune")


def _steps(config: Config) -> Iterator[Problem]:
    train = config.train
    steps, warmup = train.steps, train.warmup_steps
    if steps is None and train.epochs is None:
        yield Problem(
            "train.steps", "null", "the length of training is missing. Set train.steps=... or train.epochs=..."
        )
    if steps is not None and warmup is not None and warmup >= steps:
        yield Problem("train.warmup_steps", warmup, f"must be below train.steps={steps}. Lower it, or train longer")
    for key, other in (
        ("warmup_ratio", "warmup_steps"),
        ("evals_per_epoch", "eval_every"),
        ("saves_per_epoch", "save_every"),
    ):
        value, other_value = getattr(train, key), getattr(train, other)
        if value is not None and other_value is not None:
            message = f"says the same as train.{other}={other_value}. Set one of them, and the other to null"
            yield Problem(f"train.{key}", value, message)


def _held_out(config: Config) -> Iterator[Problem]:
    """Keys that need a held-out loss, and the step to consolidate."""
    step = config.consolidate.step
    if (isinstance(step, str) and step != BEST) or (isinstance(step, int) and step < 1):
        yield Problem("consolidate.step", step, "must be the step of a checkpoint, best, or null for the newest")
    if "train" not in config.jobs:
        return
    wanting = {
        "train.early_stopping.patience": config.train.early_stopping.patience,
        "train.keep_best": config.train.keep_best or None,
        "consolidate.step": step if step == BEST else None,
    }
    for key, value in wanting.items():
        if value is None:
            continue
        if config.train.eval_every == 0:
            message = (
                "needs held-out losses while training runs, but train.eval_every=0. Set train.evals_per_epoch=4 and "
            )
            yield Problem(key, value, message + "train.eval_every=null")
        if not (config.data.validation_path or config.data.validation_fraction):
            message = "needs held-out rows, but data.validation_fraction=0. Set data.validation_fraction=0.05"
            yield Problem(key, value, message)


def _schedule(config: Config) -> Iterator[Problem]:
    """Keys of one learning rate schedule that are set with another."""
    train, chosen, defaults = config.train, config.train.lr_schedule, Train
    for key, schedule in (
        ("lr_cycles", Schedule.cosine_restarts),
        ("lr_power", Schedule.polynomial),
        ("decay_ratio", Schedule.wsd),
    ):
        value = getattr(train, key)
        if value != getattr(defaults, key) and chosen is not schedule:
            message = f"belongs to another schedule than train.lr_schedule={chosen.name}. Set train.lr_schedule={schedule.name}"
            yield Problem(f"train.{key}", value, message)
    for key in ("warmup_steps", "warmup_ratio") if chosen is Schedule.constant else ():
        if value := getattr(train, key):
            message = "train.lr_schedule=constant has no warmup. Use train.lr_schedule=constant_with_warmup"
            yield Problem(f"train.{key}", value, message)


def _devices(config: Config, facts: Facts) -> Iterator[Problem]:
    local = config.cluster.executor is Executor.local
    for name in ("train", "cpu", "inference"):
        resources, key = getattr(config.cluster, name), f"cluster.{name}"
        gpus, ranks = resources.gpus_per_node, resources.ranks_per_node
        if local and resources.nodes > 1:
            message = "cluster=local has one node, this machine. Use cluster=slurm for more"
            yield Problem(f"{key}.nodes", resources.nodes, message)
        if gpus is None:
            message = "must be a number, because only cluster=local can count GPUs itself. Set it to 0 to use none"
            yield Problem(f"{key}.gpus_per_node", "null", message)
        elif local and gpus > facts.gpus:
            here = f"this machine has {plural(facts.gpus, 'GPU')}"
            instead = f"Use cluster.gpus={facts.gpus}, or cluster.gpus=0" if name == "train" and facts.gpus else ""
            yield Problem(
                f"{key}.gpus_per_node", gpus, f"{here}. {instead or f'Set {key}.gpus_per_node=0'} to run on the CPU"
            )
        elif name == "train" and gpus and gpus != ranks:
            message = f"must equal {key}.gpus_per_node={gpus}, because each rank uses one GPU. Set {key}.ranks_per_node={gpus}"
            yield Problem(f"{key}.ranks_per_node", ranks, message)
    yield from _single_process(config)


def _single_process(config: Config) -> Iterator[Problem]:
    """Evaluate and generate are one process, which may spread the model over several GPUs."""
    names = [name for name in config.jobs if name in JOB_KINDS and JOB_KINDS[name].section == "inference"]
    for key in ("nodes", "ranks_per_node") if names else ():
        value = getattr(config.cluster.inference, key)
        if value > 1:
            message = f"must be 1, because {' and '.join(names)} run as one process. For more GPUs set gpus_per_node"
            yield Problem(f"cluster.inference.{key}", value, message)


def _memory(config: Config) -> Iterator[Problem]:
    """Refuse a run that is estimated to need more memory than its GPUs have, where the site says how much that is."""
    capacity_gib = config.cluster.train.gpu_memory_gib
    if capacity_gib is None or "train" not in config.jobs:
        return
    config, _ = auto_settings.choose(config)
    estimate = memory.estimate(config)
    if estimate and estimate.on_gpu and estimate.device.total > capacity_gib * table.GIB:
        message = f"training needs an estimated {table.device_line(estimate)}. "
        if suggestion := suggest.first_that_fits(config, capacity_gib):
            message += f"Use {suggestion.overrides} ({table.gib(suggestion.device_bytes)} GiB per GPU)"
        else:
            message += "No other layout, batch size or number of nodes that Muster tried fits. Use larger GPUs or a smaller model"
        yield Problem("cluster.train.gpu_memory_gib", capacity_gib, message)


def _model(config: Config) -> Iterator[Problem]:
    random = config.model.init is Init.random
    if random and config.model.architecture is None:
        message = (
            "must be set, because model.init=random builds the model from it. Use model=tiny, or model.init=pretrained"
        )
        yield Problem("model.architecture", None, message)
    if config.data.packing and config.model.attention is Attention.cudnn:
        message = "cannot keep the samples of a packed row apart. Use model.attention=auto or model.attention=varlen"
        yield Problem("model.attention", "cudnn", message)
    if config.adapter.kind is AdapterKind.lora and random and "consolidate" in config.jobs:
        message = (
            "a model with random weights has no stored base to merge an adapter into. Set model.init=pretrained and "
            "model.source to a model folder or Hub id, or train without consolidating: pipeline=train"
        )
        yield Problem("adapter.kind", "lora", message)


def _site(config: Config, facts: Facts) -> Iterator[Problem]:
    cluster, submits = config.cluster, config.submit is Submit.submitit and not config.dry_run
    if not plan.runs_here(config) and submits and facts.slurm_missing:
        message = (
            f"Slurm's {facts.slurm_missing[0]} is not on PATH. Run this on a login node, "
            "preview with dry_run=true, write scripts with submit=script, or use cluster=local"
        )
        yield Problem("cluster", cluster.name, message)
    if cluster.executor is Executor.local and config.submit is Submit.script:
        yield Problem("submit", "script", "writes sbatch scripts, which cluster=local does not use. Use cluster=slurm")


def _signal(config: Config) -> Iterator[Problem]:
    warning_s, limit_min = config.cluster.signal_s, config.cluster.train.time_min
    if RESUMABLE.intersection(config.jobs) and warning_s >= limit_min * 60:
        message = (
            f"must be below cluster.train.time_min={limit_min} ({limit_min * 60} s), "
            "else training is told to stop before its first step. "
            "Raise cluster.train.time_min, or lower cluster.signal_s to the time that a checkpoint takes"
        )
        yield Problem("cluster.signal_s", warning_s, message)


def _run_folder(config: Config, facts: Facts) -> Iterator[Problem]:
    if facts.run_dir_error:
        yield Problem("run_dir", config.run_dir, facts.run_dir_error)
