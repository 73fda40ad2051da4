"""The environment contract: every variable that Muster sets, from the config and from Slurm's own; pure, but for `apply`."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conf.batch import copies, split
from conf.choices import Backend, Precision
from conf.resolve import digest
from conf.schema import Config
from launcher.plan import Job

BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
}
"""Class of a decoder block by model type; another model's own list is used by Accelerate where none is named."""


@dataclass(frozen=True)
class Ranks:
    """Where one process stands in its job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int

    def variables(self) -> dict[str, str]:
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            "NODE_WORLD_SIZE": str(self.local_world_size),
        }


def ranks(environ: Mapping[str, str]) -> Ranks:
    """From the variables of submitit's local executor, or of a Slurm task; a process started alone is rank 0 of 1."""
    if environ.get("SUBMITIT_EXECUTOR") == "local":
        rank, size = int(environ["SUBMITIT_LOCAL_GLOBALID"]), int(environ["SUBMITIT_LOCAL_NTASKS"])
        return Ranks(rank, rank, size, size, 0)
    if "SLURM_PROCID" not in environ:
        return Ranks(0, 0, 1, 1, 0)
    node = int(environ["SLURM_NODEID"])
    return Ranks(
        int(environ["SLURM_PROCID"]),
        int(environ["SLURM_LOCALID"]),
        int(environ["SLURM_NTASKS"]),
        _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_TASKS_PER_NODE"])[node],
        node,
    )


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        count, _, repeat = item.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts


def job_variables(config: Config, job: Job) -> dict[str, str]:
    """What is the same on every rank and known before the job starts: exported by the batch script, shown by dry_run."""
    run, timeout_s = Path(config.run_dir), config.cluster.network.nccl_timeout_s
    values = {
        "MUSTER_RUN": str(run),
        "MUSTER_JOB": job.name,
        "MUSTER_CONFIG": digest(config),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job.resources.cpus_per_rank),
        "SRUN_CPUS_PER_TASK": str(job.resources.cpus_per_rank),
        "SLURM_EXPORT_ENV": "ALL",  # a site's --export=NONE would keep all of this from the ranks
    }
    if config.cluster.hf_home:
        values["HF_HOME"] = config.cluster.hf_home
    if config.cluster.offline:
        values |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if job.distributed:
        flight = str(run / "jobs" / job.name / "flight_rank_")
        values |= {
            "MUSTER_NCCL_TIMEOUT": str(timeout_s),
            "AXOLOTL_NCCL_TIMEOUT": str(timeout_s),
            "DEEPSPEED_TIMEOUT": str(math.ceil(timeout_s / 60)),  # minutes, unlike all others
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_DESYNC_DEBUG": "1",
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_FR_DUMP_TEMP_FILE": flight,
            "NCCL_DEBUG": "WARN",
        }
        values |= _accelerate(config, job)
    if job.resources.gpus_per_node:
        values["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return values | config.cluster.environment


def python_path(config: Config, environ: Mapping[str, str]) -> str:
    """The run's own code before whatever PYTHONPATH already holds; PYTHONSAFEPATH keeps the working folder out of it."""
    return ":".join(item for item in (f"{config.run_dir}/code", environ.get("PYTHONPATH")) if item)


def _accelerate(config: Config, job: Job) -> dict[str, str]:
    """The plan in Accelerate's words, so that any Accelerate or Trainer program started in the job sees the same one."""
    parallel, train, world = config.parallel, config.train, job.world_size
    values = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(split(config, world)[1]),
        "ACCELERATE_MIXED_PRECISION": _mixed(train.precision),
    }
    if parallel.backend is Backend.zero:
        return values | {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(Path(config.run_dir) / "deepspeed.json"),
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(parallel.zero_stage),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": _flag(parallel.zero_stage == 3),
        }
    apart = world // parallel.tensor_ranks
    shard = parallel.shard_ranks or apart
    if shard > 1:
        values |= {
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
        block = BLOCKS.get(config.model.architecture.model_type) if config.model.architecture else None
        if block:
            values["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block
    if 1 < shard < apart or copies(config) > 1:
        values |= {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_TP_SIZE": str(parallel.tensor_ranks),
            "PARALLELISM_CONFIG_CP_SIZE": str(parallel.context_ranks),
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(max(1, shard // parallel.context_ranks)),
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(apart // shard),
        }
    return values


def network_variables(config: Config, found: str | None, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """NCCL's and Gloo's interface on this node, and the reason, given what `network.interface_to(MASTER_ADDR)` found.

    A wrong name is worse than none: NCCL's is left unset unless the interface is certain. What the user set wins.
    """
    wanted = config.cluster.network.interface
    name = found if wanted == "auto" else wanted
    if name is None:
        return {}, "no interface routes to MASTER_ADDR: left to NCCL and Gloo"
    if name == "lo":
        values, reason = {"GLOO_SOCKET_IFNAME": "lo"}, "MASTER_ADDR is this host itself: NCCL's left unset"
    else:
        exact = f"={name}" if wanted == "auto" else name  # NCCL takes a bare name for the beginning of several
        values = {"NCCL_SOCKET_IFNAME": exact, "GLOO_SOCKET_IFNAME": name}
        reason = "routes to MASTER_ADDR" if wanted == "auto" else "cluster.network.interface"
    return {key: value for key, value in values.items() if key not in environ}, f"{name}: {reason}"


def cache_variables(config: Config, user_id: int) -> dict[str, str]:
    """Compiler caches on the node's own disk: on a shared file system they go stale, and another user's are unreadable."""
    base = f"{config.cluster.scratch}/muster-{user_id}"
    return {
        "TRITON_CACHE_DIR": f"{base}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{base}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{base}/extensions",
    }


def watch_variables(config: Config, pipe: str) -> dict[str, str]:
    """NCCL's recorder listens at `pipe`R.pipe on rank R; its own monitor, which ends a rank without a word, comes last."""
    network = config.cluster.network
    last_s = max(network.nccl_timeout_s, network.step_timeout_s, network.save_timeout_s) + 120
    return {"TORCH_NCCL_DEBUG_INFO_PIPE_FILE": pipe, "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(last_s)}


def secrets(config: Config, environ: Mapping[str, str], text: str) -> dict[str, str]:
    """Values of `cluster.secrets` that the environment lacks, from the NAME=value lines of the secrets file."""
    lines = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    written = {name.strip(): value.strip() for name, value in lines}
    return {name: written[name] for name in config.cluster.secrets if name not in environ and name in written}


def apply(values: Mapping[str, str]) -> None:
    """Set variables of this process: the one place that does."""
    os.environ.update(values)


@contextmanager
def applied(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes started in the block, and put the old ones back."""
    before = dict(os.environ)
    apply(values)
    try:
        yield
    finally:
        os.environ.clear()
        apply(before)


def _mixed(precision: Precision) -> str:
    """In Accelerate's words."""
    return precision.name if precision in (Precision.bf16, Precision.fp16) else "no"


def _flag(value: bool) -> str:
    return "true" if value else "false"
