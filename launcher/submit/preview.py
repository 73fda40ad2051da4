"""What dry_run=true prints: the run in short, then each job's very sbatch text and environment; pure."""

from collections.abc import Sequence

from conf import mesh, resolve
from conf.choices import Executor, Frozen
from conf.datasets import training_paths
from conf.plural import plural
from conf.schema import Config
from launcher import environment
from launcher.estimate import memory, table
from launcher.plan import Job
from launcher.submit import render

ON_EACH_RANK = """\
MASTER_ADDR=<first host of the allocation>  MASTER_PORT=<{port}>
RANK LOCAL_RANK WORLD_SIZE={world} LOCAL_WORLD_SIZE={local} NODE_RANK NODE_WORLD_SIZE={local}
NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME=<{interface}>"""


def text(config: Config, jobs: Sequence[Job]) -> str:
    """All that would be submitted; a dependency's id is not known yet and shows as the job's name in angle brackets."""
    parts = [summary(config, jobs)]
    for job in jobs:
        parts.append(
            _heading(f"{job.name}: sbatch")
            if config.cluster.executor is Executor.slurm
            else _heading(f"{job.name}: local")
        )
        if job.name == "train" and (found := memory.estimate(config)):
            parts[-1:-1] = [_heading("train: memory"), *table.table(found)]
        if config.cluster.executor is Executor.slurm:
            parts.append(render.sbatch_text(config, job, [f"<{name}>" for name in job.after]))
        parts.append(_heading(f"{job.name}: environment"))
        parts.append(f"PYTHONPATH={config.run_dir}/code, then what it was")
        parts += [f"{key}={value}" for key, value in environment.job_variables(config, job).items()]
        if job.distributed:
            network = config.cluster.network
            parts.append(
                ON_EACH_RANK.format(
                    world=job.world_size,
                    local=job.resources.ranks_per_node,
                    port=network.master_port or "a free port, reserved on that host",
                    interface="found on each node" if network.interface == "auto" else network.interface,
                )
            )
    return "\n".join(parts)


def summary(config: Config, jobs: Sequence[Job]) -> str:
    """The run in a few lines: what is trained, how it is laid out, and the jobs with their resources."""
    train, adapter = config.train, config.adapter
    base = "" if adapter.base is Frozen.full else f" on a base in {adapter.base.name}"
    length = f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs"
    lines = [
        f"run       {config.run_dir}",
        f"model     {config.model.name} ({config.model.source}), adapter {adapter.kind.name}{base}",
        f"data      {', '.join(path for _, path in training_paths(config.data))}",
        f"training  {length} of {train.global_batch} rows, {train.precision.name}, {config.parallel.name}",
        f"config    {resolve.digest(config)}",
    ]
    for job in jobs:
        part = job.resources
        gpus = f" x {plural(part.gpus_per_node, 'GPU')}" if part.gpus_per_node else ""
        after = f"  after {', '.join(job.after)}" if job.after else ""
        lines.append(
            f"job       {job.name:<12} {plural(part.nodes, 'node')}{gpus}, "
            f"{plural(job.world_size, 'rank')}, {part.time_min} min{after}"
        )
    if any(job.name == "train" for job in jobs):
        found = memory.estimate(config)
        capacity = config.cluster.train.gpu_memory_gib
        said = table.line(found, capacity) if found else "not estimated without model.architecture"
        lines.append(f"memory    train: {said}")
        lines += mesh.picture(config.parallel, config.cluster.train.nodes, config.cluster.train.ranks_per_node)
    return "\n".join(lines)


def _heading(title: str) -> str:
    return f"\n==== {title} {'=' * max(4, 100 - len(title))}"
