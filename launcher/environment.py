"""The environment contract: every variable that Muster sets, computed from the config and from Slurm's own variables.

Pure, except `set_variables` and `temporary_variables`."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conf import node_paths
from conf.batch import ranks_per_row, split
from conf.choices import Backend, Precision
from conf.jobs import JOB_KINDS
from conf.resolve import digest
from conf.schema import Config
from launcher import containers, sbatch_options, secrets_file
from launcher.decoder_blocks import DECODER_BLOCKS
from launcher.plan import Job, ranks_per_task, resources


@dataclass(frozen=True)
class RankInfo:
    """The rank of one process and the sizes of its job, as in torch.distributed."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int

    def variables(self) -> dict[str, str]:
        """Return the variables that `init_process_group` and Accelerate read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            "NODE_WORLD_SIZE": str(self.local_world_size),
        }


def read_rank_info(environ: Mapping[str, str]) -> RankInfo:
    """Read the variables of submitit's local executor or of a Slurm task. A process started alone is rank 0 of 1."""
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        rank, size = int(environ["SUBMITIT_LOCAL_GLOBALID"]), int(environ["SUBMITIT_LOCAL_NTASKS"])
        return RankInfo(rank, rank, size, size, 0)
    if "SLURM_PROCID" not in environ:
        return RankInfo(0, 0, 1, 1, 0)
    node = int(environ["SLURM_NODEID"])
    # The variable of the step comes first: a step may have fewer tasks than its job.
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_TASKS_PER_NODE"]
    return RankInfo(
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world_size=int(environ["SLURM_NTASKS"]),
        local_world_size=_tasks_per_node(tasks_per_node)[node],
        node_rank=node,
    )


def _tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's `2(x3),1` to [2, 2, 2, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        count, _, repeat = item.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts


def job_variables(config: Config, job: Job) -> dict[str, str]:
    """Return the variables that are equal on every rank and known before the job starts.

    The batch script exports them, and dry_run=true shows them. `cluster.environment` wins over all of them.
    """
    run, timeout_s = Path(config.run_dir), config.cluster.network.nccl_timeout_s
    values = {
        "MUSTER_RUN": str(run),
        "MUSTER_JOB": job.name,
        "MUSTER_CONFIG": digest(config),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SLURM_EXPORT_ENV": "ALL",  # with a site's --export=NONE the ranks would get none of these variables
    }
    if cpus := sbatch_options.cpus_per_rank(job.resources):  # otherwise each rank counts the CPUs that it got
        threads = max(1, cpus // ranks_per_task(config, job.name))
        values |= {"OMP_NUM_THREADS": str(threads), "SRUN_CPUS_PER_TASK": str(cpus)}
    if job.distributed and (form := master_form(config)):
        values["MUSTER_MASTER_HOST"] = form
    if needs := containers.variables(config):
        values["MUSTER_NEEDS"] = " ".join(needs)
    if config.cluster.hf_home:
        values["HF_HOME"] = config.cluster.hf_home
    if config.cluster.offline or JOB_KINDS[job.name].needs_hub:
        flag = "0" if JOB_KINDS[job.name].needs_hub else "1"
        values |= {"HF_HUB_OFFLINE": flag, "HF_DATASETS_OFFLINE": flag}
    if job.distributed:
        flight_record = str(run / "jobs" / job.name / "flight_rank_")
        values |= {
            "MUSTER_NCCL_TIMEOUT": str(timeout_s),
            "AXOLOTL_NCCL_TIMEOUT": str(timeout_s),
            "DEEPSPEED_TIMEOUT": str(math.ceil(timeout_s / 60)),  # in minutes, unlike all others
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_DESYNC_DEBUG": "1",
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_FR_DUMP_TEMP_FILE": flight_record,  # torch appends the rank
            "NCCL_DEBUG": "WARN",
        }
        values |= _accelerate(config)
    if job.resources.gpus_per_node:
        values["MUSTER_GPUS"] = str(job.resources.nodes * job.resources.gpus_per_node)
        values["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return values | config.cluster.environment


def master_form(config: Config) -> str | None:
    """Return the form of MASTER_ADDR, in which `{host}` stands for the first node. None for the name of that node."""
    network = config.cluster.network
    suffix = f"{{host}}{network.master_suffix}" if network.master_suffix else None
    return config.cluster.environment.get("MASTER_ADDR") or network.master_address or suffix


def master_port(config: Config) -> int | None:
    """Return the port that the config asks for; None for any free one."""
    own = config.cluster.environment.get("MASTER_PORT")
    return int(own) if own else config.cluster.network.master_port


def thread_variables(config: Config, job: str, environ: Mapping[str, str], cpus: int, local: int) -> dict[str, str]:
    """Return OMP_NUM_THREADS of a rank that may use `cpus` CPUs, on a node with `local` ranks.

    Never more threads than that: with `--cpus-per-gpu`, whole cores or a binding, Slurm grants another number than was asked for.
    """
    if "OMP_NUM_THREADS" in config.cluster.environment:
        return {}
    on_node = int(environ.get("SLURM_CPUS_ON_NODE") or cpus)
    is_bound = cpus < on_node  # to its own CPUs; otherwise the ranks of the node share them
    asked = sbatch_options.cpus_per_rank(resources(config, job))
    granted = cpus if is_bound else max(1, min(cpus, on_node) // local)
    threads = (min(cpus, asked) if asked else granted) // ranks_per_task(config, job)
    return {"OMP_NUM_THREADS": str(max(1, threads))}


def python_path(config: Config, environ: Mapping[str, str]) -> str:
    """Return PYTHONPATH with the run's own code first, before the entries that it has already.

    PYTHONSAFEPATH, see `job_variables`, keeps Python from putting the working folder before them.
    """
    return ":".join(entry for entry in (f"{config.run_dir}/code", environ.get("PYTHONPATH")) if entry)


def _accelerate(config: Config) -> dict[str, str]:
    """Return the parallelism in Accelerate's variables, so that any Accelerate or Trainer program in the job uses the same."""
    parallel = config.parallel
    world_size = config.cluster.train.ranks  # a task may start many ranks
    values = {}
    if config.custom.command is None:  # a program of the user has a batch of its own, and this would win over its code
        values["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(split(config, world_size)[1])
    values["ACCELERATE_MIXED_PRECISION"] = _mixed_precision(config.train.precision)
    if parallel.backend is Backend.zero:
        if parallel.context_ranks > 1:  # Accelerate's name for it; otherwise each rank would read rows of its own
            values |= {
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_SP_SIZE": str(parallel.context_ranks),
                "PARALLELISM_CONFIG_SP_BACKEND": "deepspeed",
            }
        return values | {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(Path(config.run_dir) / "deepspeed.json"),
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(parallel.zero_stage),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": _flag(parallel.zero_stage == 3),
        }
    if not config.cluster.train.gpus_per_node:  # otherwise each rank trains alone
        values["ACCELERATE_USE_CPU"] = "true"
    data_ranks = world_size // parallel.tensor_ranks  # data and context parallel together
    shard_ranks = parallel.shard_ranks or data_ranks
    if shard_ranks > 1:
        values |= _fsdp(config)
    if 1 < shard_ranks < data_ranks or ranks_per_row(config) > 1:
        values |= {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_TP_SIZE": str(parallel.tensor_ranks),
            "PARALLELISM_CONFIG_CP_SIZE": str(parallel.context_ranks),
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(max(1, shard_ranks // parallel.context_ranks)),
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(data_ranks // shard_ranks),
        }
    return values


def _fsdp(config: Config) -> dict[str, str]:
    """Return Accelerate's variables for FSDP2."""
    parallel, train = config.parallel, config.train
    values = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_ACTIVATION_CHECKPOINTING": _flag(train.activation_checkpointing.recomputes),
        "FSDP_OFFLOAD_PARAMS": _flag(parallel.offload_parameters),
        "FSDP_SYNC_MODULE_STATES": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": _flag(parallel.reshard_after_forward is not False),
    }
    # not set for other families: Accelerate then uses the model's own list, as in a multimodal model, which may have another class
    shape = config.model.architecture
    block = DECODER_BLOCKS.get(shape.model_type) if shape and not shape.tower_gib else None
    if block:
        values["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block
    return values


def network_variables(
    config: Config, routing_interface: str | None, environ: Mapping[str, str]
) -> tuple[dict[str, str], str]:
    """Return the network interface of NCCL and Gloo on this node as variables, and the reason for the choice.

    `routing_interface` is the result of `rendezvous.interface_to(MASTER_ADDR)`. A wrong interface is worse than none, so
    NCCL's stays unset unless it is certain. Variables that the user has set are not changed.
    """
    setting = config.cluster.network.interface
    name = routing_interface if setting == "auto" else setting
    if name is None:
        return {}, "not set: no interface routes to MASTER_ADDR, so NCCL and Gloo choose"
    if name == "lo":
        values, reason = {"GLOO_SOCKET_IFNAME": "lo"}, "MASTER_ADDR is this host itself, so NCCL's stays unset"
    else:
        exact = f"={name}" if setting == "auto" else name  # without `=`, NCCL takes a name as a prefix of several
        values = {"NCCL_SOCKET_IFNAME": exact, "GLOO_SOCKET_IFNAME": name}
        reason = "routes to MASTER_ADDR" if setting == "auto" else "cluster.network.interface"
    return {key: value for key, value in values.items() if key not in environ}, f"{name}: {reason}"


def expand_paths(config: Config) -> None:
    """Replace variables and `~` in the paths of `config.cluster` by their values on this node. Raises ConfigError."""
    for name in ("scratch", "hf_home", "secrets_file"):
        if value := getattr(config.cluster, name):
            setattr(config.cluster, name, node_paths.expanded(value, f"cluster.{name}"))


def cache_variables(config: Config, user_id: int) -> dict[str, str]:
    """Return the folders of compiler caches, on the node's own disk and one per user.

    On a shared file system the caches go stale. Another user's cache on the same node cannot be read.
    """
    base = f"{config.cluster.scratch}/muster-{user_id}"
    return {
        "TRITON_CACHE_DIR": f"{base}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{base}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{base}/extensions",
    }


def watchdog_variables(config: Config, pipe: str) -> dict[str, str]:
    """Return the variables that let the watchdog ask NCCL's flight recorder for its file, through `pipe`R.pipe of rank R.

    NCCL's own monitor kills a rank without a diagnosis, so its time limit is two minutes after the watchdog's longest.
    """
    network = config.cluster.network
    monitor_s = max(network.nccl_timeout_s, network.step_timeout_s, network.save_timeout_s) + 120
    return {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": pipe, "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(monitor_s)}


def secret_values(config: Config, environ: Mapping[str, str], text: str) -> dict[str, str]:
    """Return the values of `cluster.secrets` and `hub.token` that the environment lacks.

    `text` is the content of the secrets file, with lines NAME=value. A line of another form is left out; the launch refuses it.
    """
    in_file, _ = secrets_file.parse(Path(config.cluster.secrets_file), text)
    return {name: in_file[name] for name in secrets_file.names(config) if name not in environ and name in in_file}


def set_variables(values: Mapping[str, str]) -> None:
    """Set environment variables of this process. The launcher sets them only here."""
    os.environ.update(values)


@contextmanager
def temporary_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started in the block, and restore the old ones afterwards."""
    before = dict(os.environ)
    set_variables(values)
    try:
        yield
    finally:
        os.environ.clear()
        set_variables(before)


def _mixed_precision(precision: Precision) -> str:
    """Return Accelerate's name for a precision."""
    names = {Precision.auto: "bf16", Precision.bf16: "bf16", Precision.fp16: "fp16"}  # `auto` is left on GPUs only
    return names.get(precision, "no")


def _flag(value: bool) -> str:
    return "true" if value else "false"
