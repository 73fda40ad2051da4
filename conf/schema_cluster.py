"""Defines the keys of `cluster`. `conf.schema` puts all sections together."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.choices import Executor, Runtime
from conf.schema_fields import at_least


@dataclass
class Resources:
    """What one kind of job asks Slurm for."""

    nodes: int = at_least(1, 1, at_most=100_000)
    ranks_per_node: int = at_least(1, 1)
    """Processes per node. With GPUs, one for each GPU. 0, with `cluster=local` only: one for each GPU of this machine; two
    if it has none."""
    gpus_per_node: int | None = at_least(0, 0)
    """GPUs per node. Null, with `cluster=local` only: one for each rank if this machine has GPUs, else the CPU."""
    gpu_type: str | None = None
    """Slurm's name of the GPU type to ask for, on clusters with several types."""
    gpu_memory_gib: float | None = at_least(1, None, at_most=2048)
    """Memory of one GPU, in GiB (an 80 GB card has 79, an H200 has 139). Muster chooses settings that fit into it, and refuses a
    run that is estimated to need more before it is queued. Null: with `cluster=local`, the memory of this machine's GPUs;
    else nothing is compared, because a login node cannot see the GPUs of compute nodes."""
    cpus_per_rank: int = at_least(1, 1)
    memory_gib: int | None = at_least(0, None, at_most=32_768)
    """Host memory per node, in GiB. 0: all of it. Null: the partition's default."""
    time_min: int = at_least(1, 60, at_most=527_040)
    """Time limit, in minutes."""
    partition: str | None = None
    """Null: the cluster's default partition."""
    qos: str | None = None
    """Slurm quality of service. Null: the default."""
    constraint: str | None = None
    """Slurm features that the nodes must have."""
    exclude: str | None = None
    """Nodes not to use, in Slurm's notation."""
    exclusive: bool = False
    """Do not share nodes with other jobs."""
    sbatch: dict[str, str | None] = field(default_factory=dict)
    """Any other sbatch options, for example `{reservation: night, overcommit: true}`. True: a flag without a value. Null: leave
    out an option that Muster sets. An option that asks for the same in another way replaces Muster's: `{gres: "gpu:8"}`,
    `{mem-per-cpu: 4G}`. `dependency` is added to the dependencies of the job. Put times into quotes."""

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node


@dataclass
class Network:
    interface: str = "auto"
    """Network interface for sockets. `auto`: on each node, the interface that routes to MASTER_ADDR."""
    master_suffix: str | None = None
    """Added to the name of the first node to get MASTER_ADDR, where ranks must meet at another name than Slurm's: with `i`,
    jwb0001 becomes jwb0001i."""
    master_address: str | None = None
    """MASTER_ADDR itself, used instead of the first node's name. `{host}` stands for that name: `ib-{host}`."""
    master_port: int | None = at_least(1024, None, at_most=65535)
    """Null: a free port below the ephemeral range, derived from the job id and reserved while the job runs."""
    nccl_timeout_s: int = at_least(1, 1800)
    """Sets MUSTER_NCCL_TIMEOUT and the timeouts of all libraries: seconds without progress that are allowed during start-up and
    loading. If a rank is silent for longer, the watchdog of its node writes where the rank hangs, ends the job, and the job
    restarts."""
    step_timeout_s: int = at_least(1, 600)
    """The same for a training step or a batch of evaluation. Shorter, because a hanging step wastes every GPU."""
    save_timeout_s: int = at_least(1, 1800)
    """The same for a checkpoint. Long enough for the slowest disk."""


@dataclass
class Container:
    """The container that every rank runs in. Everything that the jobs read and write is mounted at its own path."""

    image: str | None = None
    """Image, for example `/images/muster.sif` or `nvcr.io#nvidia/pytorch:25.09-py3`. Null: no container."""
    runtime: Runtime = Runtime.auto
    """Program that starts the container. `auto`: `pyxis` for an image of enroot (a .sqsh file, or `registry#image`), else
    `apptainer` or `singularity`, whichever the node has."""
    program: str | None = None
    """Path of the program, where it is not on PATH or has another name. Not for `pyxis`, which is a part of srun."""
    flags: list[str] = field(default_factory=list)
    """Additional arguments of `apptainer exec` or `singularity exec`, for example `--cleanenv`; with `pyxis`, of srun. `--nv` or
    `--rocm` is added for the GPUs of the node."""
    mounts: list[str] = field(default_factory=list)
    """More paths to mount, as `/path`, `/path:/inside` or `/path:/inside:ro`. `$NAME` is expanded on the node."""


@dataclass
class Cluster:
    name: str = MISSING
    """Name of the cluster: the name of its YAML file."""
    executor: Executor = MISSING
    """`slurm`: submit jobs. `local`: run them on this machine, one after the other."""
    gpus: int | None = at_least(0, None)
    """GPUs that training uses, on all nodes together. Sets `nodes`, `ranks_per_node` and `gpus_per_node` of `cluster.train`, whose
    `gpus_per_node` says how many a node has. 0, with `cluster=local` only: the CPU. Null: as `cluster.train` says."""
    partition: str | None = None
    """Slurm partition of all jobs: sets `partition` of `cluster.train`, `cluster.cpu` and `cluster.inference`. Null: what these
    say."""
    train: Resources = field(default_factory=Resources)
    """Resources for preflight and train."""
    cpu: Resources = field(default_factory=Resources)
    """Resources for preprocess and consolidate, which need no GPU. Several ranks share the files of a consolidation; preprocess
    always runs as one process."""
    inference: Resources = field(default_factory=Resources)
    """Resources for evaluate and generate: one process, which may spread the model over several GPUs."""
    account: str | None = None
    """Slurm account to charge. Null: your default account."""
    python: str | None = None
    """Python interpreter on the compute nodes. Null: the one that runs launch.py; in a container, `python3`."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first, with `module load`."""
    setup: list[str] = field(default_factory=list, metadata={"text": "shell"})
    """Shell lines to run on the first node before the ranks start. End a line that must succeed with `|| exit 2`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables for every rank, exactly as written. They win over all others, also over those of Muster and srun.
    Put secrets into `secrets` instead, and values that the node must expand into `setup`: `export TMPDIR=/x/$SLURM_JOB_ID`."""
    secrets: list[str] = field(default_factory=list)
    """Names of the secret variables that jobs need, for example HF_TOKEN. Only names are stored. The job reads the values from
    the environment of `launch.py` or from `secrets_file`."""
    secrets_file: str = "~/.config/muster/secrets"
    """File with `NAME=value` lines that only you can read, for secrets that are not in the environment of the job. `$NAME` is
    expanded on the node."""
    scratch: str = "/tmp"
    """Folder on the local disk of each node for compiler caches and heartbeats. Shared file systems corrupt compiler caches.
    `$NAME` is expanded on the node: `$SLURM_TMPDIR`, `/lscratch/$SLURM_JOB_ID`."""
    hf_home: str | None = None
    """HF_HOME of the jobs. Null: not changed. `$NAME` is expanded on the node."""
    offline: bool = False
    """Set if compute nodes cannot reach the Hub. Sets HF_HUB_OFFLINE=1, so that nothing waits for a timeout. `pipeline=fetch`
    downloads what the run needs before."""
    signal_s: int = at_least(1, 120)
    """Seconds before the time limit at which ranks save and stop. Must be long enough for a checkpoint. Slurm may send the signal
    up to 60 s earlier."""
    requeue: bool = True
    """Restart a job that was preempted, reached its time limit or failed, with the same job id, so that dependent jobs wait for
    it. Never after a user error. False: you restart it with `muster resume RUN`."""
    max_restarts: int = at_least(0, 3)
    """Restarts after failures since the last new checkpoint. Time limits do not count, preemption only before the first step."""
    network: Network = field(default_factory=Network)
    container: Container = field(default_factory=Container)
    srun_args: list[str] = field(default_factory=list)
    """Additional arguments for srun, for example `--mpi=none`."""
