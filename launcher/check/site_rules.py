"""Refuses values of the section `cluster` that Slurm, the shell or a container would misread; pure."""

import re
from collections.abc import Iterator

from conf import node_paths
from conf.choices import Executor, Runtime
from conf.errors import Problem
from conf.plural import plural
from conf.schema import Config
from conf.schema_cluster import Resources
from launcher import containers, plan, sbatch_options

PARTS = ("train", "cpu", "inference")
SHELL_NAMES = re.compile(
    r"BASH\w*|COMP_\w+|DIRSTACK|E?UID|FUNCNAME|GROUPS|IFS|LINENO|PIPESTATUS|POSIXLY_CORRECT|PPID|RANDOM|SECONDS|SHELLOPTS"
    r"|muster\w*|attempt|child|line|name|srun_log"
)
"""Variables that bash sets itself, or that the batch script needs."""
RANK_NAMES = re.compile(
    r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|NODE_RANK|NODE_WORLD_SIZE|SLURM_(JOB|STEP)_?\w*|SLURM_(PROC|LOCAL|NODE)ID"
    r"|SLURM_N(TASKS|PROCS|NODES)|SLURM_TASKS_PER_NODE|SLURM_RESTART_COUNT|SUBMITIT\w*|MUSTER_(?!NCCL_TIMEOUT$)\w*"
)
"""Variables that differ from rank to rank or from attempt to attempt. A constant would give every rank the same."""
SRUN_OWN = {
    "output": "logs belong into the run folder. Set run_dir=...",
    "error": "logs belong into the run folder. Set run_dir=...",
    "nodes": "Set cluster.train.nodes=...",
    "ntasks": "Set cluster.train.ranks_per_node=...",
    "ntasks-per-node": "Set cluster.train.ranks_per_node=...",
    "chdir": "ranks start in the run folder. Set run_dir=...",
    "label": "it would change the lines of the logs, which begin with the rank already. Remove it",
    "multi-prog": "all ranks run the same program. Remove it",
    "pty": "ranks have no terminal. Remove it",
    "kill-on-bad-exit": "ranks would wait for one that has failed. Remove it",
}
"""Options of srun that Muster needs, and what to do instead."""
SRUN_SHORT = {
    "o": "output",
    "e": "error",
    "N": "nodes",
    "n": "ntasks",
    "D": "chdir",
    "l": "label",
    "K": "kill-on-bad-exit",
}
DEPENDENCY = re.compile(
    r"singleton|(after|afterany|afterok|afternotok|aftercorr|afterburstbuffer|expand)(:\d+(_\d+)?(\+\d+)?)+"
)


def problems(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the section `cluster`."""
    for name in PARTS:
        yield from _sbatch(getattr(config.cluster, name), f"cluster.{name}")
    yield from _names(config)
    yield from _variables(config)
    yield from _visible_gpus(config)
    yield from _srun(config)
    yield from _network(config)
    yield from _paths(config)
    if config.cluster.container.image is not None:
        yield from _container(config)


def _sbatch(part: Resources, section: str) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for key, text in part.sbatch.items():
        name = sbatch_options.long_name(key)
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
            yield Problem(
                f"{section}.sbatch", key, "is not the name of an option. Write it as sbatch does, for example gres"
            )
        elif name in seen:
            yield Problem(f"{section}.sbatch.{key}", text, f"is the same option as {seen[name]}. Write it once")
        else:
            yield from _option(name, f"{section}.sbatch.{key}", text, section)
        seen[name] = key
    yield from _gpu_options(part, section)


def _option(name: str, key: str, text: str | None, section: str) -> Iterator[Problem]:
    value = sbatch_options.value_of(name, text)
    if value is None and name not in sbatch_options.CANNOT_BE_REMOVED:
        return
    if name in sbatch_options.OWN:
        instead = sbatch_options.OWN[name].format(section=section)
        minutes = sbatch_options.minutes(str(text)) if name == "time" else None
        instead = instead.replace("time_min=...", f"time_min={minutes}") if minutes else instead
        yield Problem(key, text, f"Muster sets --{name} itself: {instead[0].lower() + instead[1:]}")
    elif name in sbatch_options.FLAGS and value is not True:
        yield Problem(key, text, f"--{name} takes no value. Write true to set it, or false to leave it out")
    elif name in sbatch_options.WITH_VALUE and text in ("True", "False", "") and name != "kill-on-invalid-dep":
        yield Problem(key, text, f"--{name} needs a value. If you mean the word itself, put it into quotes")
    elif name == "dependency" and not all(DEPENDENCY.fullmatch(part) for part in str(text).split(",")):
        message = "is not a list such as afterok:123:124,singleton. All conditions must hold, also those of Muster: use commas"
        yield Problem(key, text, message)
    elif name in ("begin", "deadline") and re.fullmatch(r"\d+", str(text)):
        yield Problem(key, text, "is not a time. YAML reads 16:00 as a number: put it into quotes")
    elif name == "cpus-per-task" and not re.fullmatch(r"[1-9]\d*", str(text)):
        yield Problem(key, text, f"must be a whole number. Set {section}.cpus_per_rank=...")


def _gpu_options(part: Resources, section: str) -> Iterator[Problem]:
    """GPUs that are asked for in another way must be one for each rank."""
    options, gpus = sbatch_options.given(part), part.gpus_per_node or 0
    for name, expected, per in (
        ("gres", gpus, "node"),
        ("tres-per-task", 1, "task"),
        ("gpus-per-task", 1, "task"),
        ("gpus-per-node", gpus, "node"),
        ("gpus", gpus * part.nodes, "job"),
    ):
        value = options.get(name)
        counts = sbatch_options.gpus_in(value)
        if isinstance(value, str) and name.startswith("gpus"):
            counts = [int(item.rpartition(":")[2]) for item in value.split(",") if item.rpartition(":")[2].isdecimal()]
        if counts and sum(counts) != expected:
            message = f"asks for {sum(counts)} per {per}, but {section}.gpus_per_node={gpus} with one rank for each GPU"
            remedy = f"Set {section}.gpus_per_node and {section}.ranks_per_node, or write {expected} here"
            yield Problem(f"{section}.sbatch.{name}", value, f"{message}. {remedy}")


def _variables(config: Config) -> Iterator[Problem]:
    for name, value in config.cluster.environment.items():
        key = f"cluster.environment.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            yield Problem(key, None, "is not a valid variable name. Use only letters, digits and _")
        elif SHELL_NAMES.fullmatch(name):
            yield Problem(key, value, "belongs to the shell of the batch script. Set it in your program")
        elif RANK_NAMES.fullmatch(name):
            yield Problem(key, value, "is another one for each rank or attempt, and computed there. Remove it")
        elif name == "MASTER_PORT" and not (value.isdecimal() and 1024 <= int(value) <= 65535):
            yield Problem(key, value, "must be a number from 1024 to 65535. Set cluster.network.master_port instead")


def _visible_gpus(config: Config) -> Iterator[Problem]:
    """A list of GPUs that is the same for all jobs must name as many as training uses."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        value, gpus = config.cluster.environment.get(name), config.cluster.train.gpus_per_node
        named = len([item for item in (value or "").split(",") if item.strip()])
        if value is not None and gpus and named != gpus:
            message = f"shows {plural(named, 'GPU')} to every rank, but cluster.train.gpus_per_node={gpus}. "
            yield Problem(f"cluster.environment.{name}", value, f"{message}Remove it: Slurm says which GPUs a job has")


def _names(config: Config) -> Iterator[Problem]:
    """Names that Slurm knows have no blanks; sbatch would refuse them after other jobs have been queued."""
    cluster = config.cluster
    named = {
        f"cluster.{part}.{key}": getattr(getattr(cluster, part), key) for part in PARTS for key in ("partition", "qos")
    }
    for key, value in {"cluster.account": cluster.account, **named}.items():
        lines = len((value or "").splitlines())  # `conf.text` says that there is more than one
        if value and lines == 1 and not re.fullmatch(r"[^\s,]+(,[^\s,]+)*", value):
            yield Problem(key, value, "is no name. Write it without blanks, and several with a comma between them")


def _srun(config: Config) -> Iterator[Problem]:
    for position, word in enumerate(config.cluster.srun_args):
        if position == 0 and not word.startswith("-"):
            yield Problem(
                "cluster.srun_args",
                word,
                "is not an option of srun, and would be run as a program. Write --option=value",
            )
        name = word.removeprefix("--").split("=")[0] if word.startswith("--") else SRUN_SHORT.get(word[1:2], "")
        if word.startswith("-") and name in SRUN_OWN:
            instead = SRUN_OWN[name]
            yield Problem("cluster.srun_args", word, f"Muster sets --{name} itself: {instead[0].lower() + instead[1:]}")


def _network(config: Config) -> Iterator[Problem]:
    network = config.cluster.network
    if network.master_suffix is not None and not re.fullmatch(r"[\w.-]+", network.master_suffix, re.ASCII):
        message = "may have letters, digits, '.', '_' and '-' only: it becomes a part of a host name, as i in jwb0001i"
        yield Problem("cluster.network.master_suffix", network.master_suffix, message)
    address = (network.master_address or "").replace("{host}", "")
    if not re.fullmatch(r"[\w.:-]*", address, re.ASCII):
        message = "is neither a host name nor an address. Write for example ib-{host}, where {host} is the name of the first node"
        yield Problem("cluster.network.master_address", network.master_address, message)
    if network.master_suffix is not None and network.master_address is not None:
        message = f"is not used, because cluster.network.master_address={network.master_address}. Remove one of them"
        yield Problem("cluster.network.master_suffix", network.master_suffix, message)


def _paths(config: Config) -> Iterator[Problem]:
    """Paths that the node completes must be absolute there, and hold variables only."""
    cluster = config.cluster
    for key, path in (
        ("cluster.scratch", cluster.scratch),
        ("cluster.hf_home", cluster.hf_home),
        ("cluster.secrets_file", cluster.secrets_file),
        ("data.cache", config.data.cache),
        ("cluster.container.image", cluster.container.image),
        *(("cluster.container.mounts", entry) for entry in cluster.container.mounts),
    ):
        if path and not node_paths.is_clear(path):
            yield Problem(key, path, "has a $ or ` that is no variable. Write $NAME or ${NAME}; commands are not run")
        if path and key.startswith("cluster.") and not key.endswith("image") and not path.startswith(("/", "$", "~")):
            yield Problem(key, path, "is relative, and jobs start in another folder. Write it with a / at its start")


def _container_here(config: Config, pyxis: bool) -> Iterator[Problem]:
    """What a container needs of Slurm, where jobs run on this machine."""
    is_local = config.cluster.executor is Executor.local
    who = "cluster=local" if is_local else "hub.where=here"
    if pyxis:
        remedy = "an image for apptainer, or cluster=slurm" if is_local else "hub.where=job"
        message = f"is started by srun, which {who} does not use. Use {remedy}"
        yield Problem("cluster.container.runtime", "pyxis", message)
    if found := containers.variables(config):
        name, _, key = found[0].partition(":")
        remedy = "Write the path itself" if is_local else "Use hub.where=job, or write the path itself"
        yield Problem(key, f"${name}", f"is expanded by batch scripts, which {who} does not have. {remedy}")


def _container(config: Config) -> Iterator[Problem]:
    container = config.cluster.container
    pyxis = containers.runtime(container) is Runtime.pyxis
    if pyxis and container.program is not None:
        yield Problem(
            "cluster.container.program", container.program, "pyxis is a part of srun, and no program. Remove it"
        )
    if plan.runs_here(config):
        yield from _container_here(config, pyxis)
    for flag in container.flags:
        if not flag.startswith("-"):
            yield Problem("cluster.container.flags", flag, "would be taken for the image. Write --option=value")
    for entry in container.mounts:
        mount = containers.parsed(entry)
        if not mount.target.startswith(("/", "$")) or "," in mount.source + mount.target or ":" in mount.options:
            message = "is not /path, /path:/inside or /path:/inside:ro, without commas. Write one entry for each path"
            yield Problem("cluster.container.mounts", entry, message)
    for key, path in containers.needed(config):
        if set(path) & set(",:"):
            message = "has a comma or a colon, which separate mounts of a container. Choose another path"
            yield Problem(key, path, message)
