"""Builds the text of dry_run=true: a summary of the run, then the sbatch text and the environment of each job. Pure."""

from collections.abc import Mapping, Sequence

from conf import mesh, resolve, schedule
from conf.batch import ranks_per_row, split
from conf.choices import Executor, Frozen, Schedule
from conf.datasets import training_paths
from conf.plural import plural
from conf.schema import Config
from conf.schema_training import Train
from launcher import environment
from launcher.estimate import memory, parameters, table
from launcher.plan import Job
from launcher.submit import render

ON_EACH_RANK = """\
MASTER_ADDR={address}  MASTER_PORT={port}
RANK LOCAL_RANK WORLD_SIZE={world} LOCAL_WORLD_SIZE={local} NODE_RANK NODE_WORLD_SIZE={local}
NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME=<{interface}>"""

KEYS_OF_SBATCH = {
    "SBATCH_ACCOUNT": "cluster.account",
    "SBATCH_PARTITION": "cluster.train.partition",
    "SBATCH_QOS": "cluster.train.qos",
    "SBATCH_CONSTRAINT": "cluster.train.constraint",
}
"""Variables of sbatch whose value has a key of its own."""


def text(config: Config, jobs: Sequence[Job], rows: int | None = None) -> str:
    """Return everything that would be submitted. rows: of an epoch, if they are known; see record.training_rows.

    The id of a dependency is not known yet, so the job's name in angle brackets stands for it.
    """
    parts = [summary(config, jobs, rows)]
    on_slurm = config.cluster.executor is Executor.slurm
    for job in jobs:
        if job.name == "train" and (estimate := memory.estimate(config)):
            parts += [heading("train: memory"), *table.table(estimate)]
        parts.append(heading(f"{job.name}: {'sbatch' if on_slurm else 'local'}"))
        if on_slurm:
            parts.append(render.sbatch_text(config, job, [f"<{name}>" for name in job.after]))
        parts.append(heading(f"{job.name}: environment"))
        parts.append(f"PYTHONPATH={config.run_dir}/code, then the value that it has already")
        parts += [f"{key}={value}" for key, value in environment.job_variables(config, job).items()]
        if job.distributed:
            network = config.cluster.network
            parts.append(
                ON_EACH_RANK.format(
                    world=job.world_size,
                    local=job.resources.ranks_per_node,
                    address=environment.master_form(config) or "<first host of the allocation>",
                    port=environment.master_port(config) or "<a free port, reserved on that host>",
                    interface="found on each node" if network.interface == "auto" else network.interface,
                )
            )
    return "\n".join(parts)


def summary(config: Config, jobs: Sequence[Job], rows: int | None = None) -> str:
    """Return the run in a few lines: what is trained and how, the jobs with their resources, and the memory estimate."""
    if config.custom.command is not None:
        return "\n".join(
            [
                f"run       {config.run_dir}",
                f"program   {config.custom.command}, started by {config.custom.launcher.name} in {config.custom.folder}",
                f"config    {resolve.digest(config)}",
                *(_job_line(job) for job in jobs),
            ]
        )
    adapter = config.adapter
    base = "" if adapter.base is Frozen.full else f" on a base in {adapter.base.name}"
    base += f", r {adapter.r}, going on from {adapter.source}" if adapter.source else ""
    lines = [
        f"run       {config.run_dir}",
        f"model     {config.model.name} ({config.model.source}), adapter {adapter.kind.name}{base}",
        f"data      {', '.join(path for _, path in training_paths(config.data))}",
        training(config, rows),
        f"config    {resolve.digest(config)}",
    ]
    lines += [_job_line(job) for job in jobs]
    if any(job.name == "train" for job in jobs):
        estimate = memory.estimate(config)
        capacity_gib = config.cluster.train.gpu_memory_gib
        reason = parameters.why_not_counted(config.model.architecture)
        need = table.line(estimate, capacity_gib) if estimate else f"not estimated, because {reason}"
        lines.append(f"memory    train: {need}")
        lines += mesh.picture(config.parallel, config.cluster.train.nodes, config.cluster.train.ranks_per_node)
    return "\n".join(lines)


def training(config: Config, rows: int | None = None) -> str:
    """Return the line that says how much is trained in a step, and how. rows: of an epoch, if they are known."""
    train, resources = config.train, config.cluster.train
    world = resources.nodes * resources.ranks_per_node
    batch = f"{train.global_batch:,} rows"
    groups = world // ranks_per_row(config)
    if groups and train.global_batch % groups == 0:  # otherwise it is refused
        micro, accumulated = split(config, world)
        ranks = (
            plural(groups, "rank") if groups == world else f"{plural(groups, 'group')} of {ranks_per_row(config)} ranks"
        )
        batch += f" ({micro} x {accumulated} accumulated x {ranks})"
    tokens = f"{'' if config.data.packing else 'at most '}{train.global_batch * config.data.max_length:,} tokens a step"
    rate = f"learning rate {train.learning_rate:g} {train.lr_schedule.name}"
    device = (
        f"on {plural(resources.nodes * resources.gpus_per_node, 'GPU')}" if resources.gpus_per_node else "on the CPU"
    )
    parts = (
        f"training  {_length(train, rows)} of {batch}, {tokens}",
        f"{rate}, warmup {_warmup(train)}",
        f"{train.optimizer.name}, max_length {config.data.max_length:,}",
        f"precision {train.precision.name}, {config.parallel.name}, {device}",
    )
    unknown = "" if train.steps or rows is not None else "; how many steps these are is known after preprocess"
    return ", ".join(parts) + unknown


def _length(train: Train, rows: int | None) -> str:
    """The number of steps. Where train.epochs gives it, it follows from the rows of an epoch."""
    if train.steps:
        return plural(train.steps, "step")
    epochs = "1 epoch" if train.epochs == 1 else f"{train.epochs:g} epochs"
    if rows is None:
        return f"{epochs} in steps"
    return f"{epochs}: {plural(schedule.steps(train, rows), 'step')}"


def _warmup(train: Train) -> str:
    """The length of the warmup. If the number of steps is not known yet, as the config says it."""
    if train.lr_schedule is Schedule.constant:
        return "none"
    if train.steps:
        return plural(schedule.warmup_steps(train, train.steps), "step")
    if train.warmup_steps is not None:
        return plural(train.warmup_steps, "step")
    if train.warmup_ratio is not None:
        return f"{100 * train.warmup_ratio:g} % of the steps"
    return f"{schedule.WARMUP_STEPS} steps"


def _job_line(job: Job) -> str:
    part = job.resources
    gpus = f" x {plural(part.gpus_per_node, 'GPU')}" if part.gpus_per_node else ""
    after = f"  after {', '.join(job.after)}" if job.after else ""
    ranks = plural(job.world_size, "rank")
    return f"job       {job.name:<12} {plural(part.nodes, 'node')}{gpus}, {ranks}, {part.time_min} min{after}"


def ignored_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each variable of a profile that sbatch would obey, and that is kept from it, with the key to set."""
    keys = {name: key for name, key in KEYS_OF_SBATCH.items() if environ.get(name)}
    others = sorted(name for name in environ if name.startswith("SBATCH_") and environ[name] and name not in keys)
    options = {name: name.removeprefix("SBATCH_").lower().replace("_", "-") for name in others}
    return [
        *(f"ignored   {name}={environ[name]}. To use it: {key}={environ[name]}" for name, key in keys.items()),
        *(
            f"ignored   {name}={environ[name]}. To use it: cluster.train.sbatch={{{option}: {environ[name]}}}"
            for name, option in options.items()
        ),
    ]


def heading(title: str) -> str:
    return f"\n==== {title} {'=' * max(4, 100 - len(title))}"
