"""What can be configured: one dataclass a section, a sentence under each field with its unit and why that default.

Values that belong to one choice (a model, a layout, a cluster) stand in the YAML files beside this one;
values that nearly everybody wants stand here as defaults. No value stands in both.

Long because it is the one list of all keys.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from conf.choices import (
    AdapterKind,
    Attention,
    Backend,
    Checkpointing,
    Container,
    Executor,
    Float8,
    Format,
    Frozen,
    Init,
    Mask,
    MergeBase,
    Optimizer,
    Order,
    OutputDtype,
    Overlong,
    Precision,
    Submit,
    Tracker,
    Verify,
)


def at_least(minimum: float, default: Any = MISSING, *, at_most: float = inf) -> Any:
    """A field whose number has bounds; `launcher.check.rules` reads them from the metadata."""
    return field(default=default, metadata={"minimum": minimum, "maximum": at_most})


def entries(section: type) -> Any:
    """A dictionary of sections under names that the user chooses; `conf.resolve` makes them what `section` says."""
    return field(default_factory=dict, metadata={"section": section})


@dataclass
class Architecture:
    """The fields of a Hugging Face config.json that fix a model's shape: enough to build it, and to estimate its memory."""

    model_type: str = MISSING
    """Transformers' name of the family, such as `llama` or `qwen2`."""
    vocab_size: int = at_least(1)
    hidden_size: int = at_least(1)
    intermediate_size: int = at_least(1)
    num_hidden_layers: int = at_least(1)
    num_attention_heads: int = at_least(1)
    num_key_value_heads: int = at_least(1)
    max_position_embeddings: int = at_least(1)
    tie_word_embeddings: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """Any further fields of config.json, passed on as they are (rope parameters, head_dim, biases)."""


@dataclass
class Model:
    name: str = MISSING
    """Short name, used in the run's name."""
    source: str = MISSING
    """Hub id, or folder, of the weights, config and tokenizer."""
    revision: str | None = None
    """Hub commit, tag or branch; pin a commit where a run must be repeatable."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer than the one in `source`."""
    init: Init = Init.pretrained
    """`pretrained` reads weights from `source`; `random` builds `architecture` with fresh weights (demo, benchmarks)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, because that code runs with your rights."""
    attention: Attention = Attention.auto
    """Attention kernel. `auto` takes the fastest that the model, the GPU and `data.packing` allow, of torch's own, and says
    which: `cudnn` for a sample a row on Hopper and later, `varlen` for packed rows. flash_attention_* need their package."""
    architecture: Architecture | None = None
    """Shape of the model; needed for `init: random`, and for checks and estimates without the network."""


@dataclass
class DataSet:
    """One of several sets of training rows, as in `data.sets.NAME.path=...`."""

    path: str = MISSING
    """Like `data.path`."""
    split: str | None = None
    """Like `data.split`."""
    format: Format | None = None
    """Null is `data.format`; `fields` and `roles` are likewise the set's own, or else those of `data`."""
    fields: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    weight: float = at_least(0.0001, 1.0)
    """How often a row comes in an epoch: 2 is twice, 0.5 a random half of the rows, chosen by `data.seed`."""
    num_samples: int | None = at_least(1, None, at_most=1e9)
    """Rows an epoch, in place of `weight`: a random part of the set, or the set as often as it takes."""


@dataclass
class Gates:
    """Share of the rows, from 0 to 1, above which preprocess stops; below it what was found is counted, shown and kept going.

    1 never stops. Rows that cannot be used are left out where their gate lets the others pass.
    """

    unreadable: float = at_least(0, 0.0, at_most=1)
    """Lines that are not JSON, not UTF-8, or no object with named columns."""
    unusable: float = at_least(0, 0.0, at_most=1)
    """Rows that do not fit the format: columns missing or null, a text that is none, a template that refuses the turns."""
    roles: float = at_least(0, 0.0, at_most=1)
    """Rows with a speaker that is not known; see `data.roles`."""
    empty: float = at_least(0, 0.0, at_most=1)
    """Rows whose question or answer is empty."""
    overlong: float = at_least(0, 0.2, at_most=1)
    """Rows over `data.max_length` that are cut or dropped; where `data.overlong` splits them nothing is lost, or stopped."""
    untrained: float = at_least(0, 0.05, at_most=1)
    """Rows in which no token is trained (say, because the answer was cut off); they are left out."""
    endless: float = at_least(0, 0.05, at_most=1)
    """Rows, not cut, whose last trained token does not end a turn or the text: a model that sees no end never stops."""
    placeholders: float = at_least(0, 0.02, at_most=1)
    """Rows with a template's hole left open, such as {instruction} or {{ name }}."""
    vocabulary: float = at_least(0, 0.0, at_most=1)
    """Rows of finished tokens with an id that the tokenizer does not have; they are left out."""
    duplicates: float = at_least(0, 0.2, at_most=1)
    """Training rows that are equal to one before, token for token; see `data.drop_duplicates`."""
    overlap: float = at_least(0, 0.01, at_most=1)
    """Held-out rows that are trained on too: their loss says little."""


@dataclass
class Data:
    name: str = MISSING
    path: str | None = MISSING
    """Training rows: a file (JSON, JSONL, Parquet, Arrow, CSV, TSV, text; also .gz, .bz2, .xz), a folder or a glob of
    such files, or a Hub id, `owner/name` or `owner/name:train[:100]`."""
    split: str | None = None
    """Part of the rows, in Python's and the Hub's notation: `[:1000]`, `[10%:]`, `[-100:]`."""
    sets: dict[str, Any] = entries(DataSet)
    """Several sets in place of `path`: each by a name, with a path and a weight of its own."""
    format: Format = Format.auto
    """Shape of a row; `auto` recognises it from the columns and says which it took."""
    fields: dict[str, str] = field(default_factory=dict)
    """For columns of other names: the format's column to yours, or to a Jinja text over the row ("{{ title }}: {{ body }}")."""
    roles: dict[str, str] = field(default_factory=dict)
    """For speakers of other names: yours to system, user, assistant or tool."""
    chat_template: str | None = None
    """Null is the tokenizer's own; else chatml, gemma, llama3, mistral, qwen, or a Jinja file. Goes into the merged model."""
    mask: Mask = Mask.assistant
    """What is trained of a chat: every assistant turn, the last one, or all; a turn's own `train` wins over it."""
    eos_token: str | None = None
    """Token that ends a text, in place of the tokenizer's; also where generation stops."""
    pad_token: str | None = None
    """Token that fills rows up; null is the tokenizer's own, or else its end-of-text token."""
    special_tokens: list[str] = field(default_factory=list)
    """Further tokens that are never split, such as `<|im_start|>`; the embedding grows where the model lacks rows for them."""
    validation_path: str | None = None
    """Held-out rows, named as in `path`; without it `validation_fraction` of the rows is held out."""
    validation_split: str | None = None
    """Part of `validation_path`, as in `split`; it may be another part of the training file."""
    validation_fraction: float = at_least(0, 0.05, at_most=0.5)
    """Share of rows held out where there is no `validation_path`: chosen by their content and `seed`, so that equal rows
    stay together and a longer file keeps the choice."""
    max_length: int = at_least(2, 2048)
    """Longest row, in tokens."""
    overlong: Overlong = Overlong.truncate
    """What happens to a sample longer than `max_length`; `split` goes on in a further one. Every case is counted."""
    packing: bool = False
    """Put several samples into one row of `max_length` tokens, each attending only to itself; a row is then full, and
    `train.global_batch` counts rows."""
    order: Order = Order.auto
    """Of the rows in an epoch. `balanced` is random, but the rows of a step cost the same, so that no rank waits for
    another; `random` draws freely; `file` keeps the order of the input, for a curriculum. `auto` balances packed rows, and
    draws others freely, for steps of short samples alone would weigh their tokens more."""
    drop_duplicates: bool = False
    """Keep only the first of training rows that are equal token for token."""
    max_rows: int | None = at_least(1, None)
    """Use only the first rows of each set: a quick look before the whole of it."""
    preview: int = at_least(0, 1)
    """Samples shown in the log as the model will see them; RUN/data/preview.html has more."""
    workers: int | None = at_least(1, None)
    """Processes that tokenise; null is one a core of the preprocess job (`cluster.cpu.cpus_per_rank`)."""
    cache: str | None = None
    """Folder of tokenised sets, shared between runs and named by their content; null is `.data` beside the run's folder."""
    seed: int = at_least(0, 0)
    """Fixes the held-out rows, the parts taken of sets, and the order of training."""
    gates: Gates = field(default_factory=Gates)


@dataclass
class Parallel:
    name: str = MISSING
    backend: Backend = MISSING
    """Who shards: torch FSDP2 or DeepSpeed ZeRO."""
    shard_ranks: int | None = at_least(1, None)
    """FSDP: ranks that share one sharded copy of the model. Null is all of them; 1 is plain data parallelism;
    the ranks of a node is HSDP, which keeps parameter traffic inside the node."""
    zero_stage: int = at_least(0, 0)
    """ZeRO: 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state and its step in host memory: slower, for models that do not fit."""
    offload_parameters: bool = False
    """Keep sharded parameters in host memory between uses."""
    reshard_after_forward: bool | None = None
    """FSDP: free gathered parameters after forward. False spends memory to gather once instead of twice a step; null does so
    where that is estimated to fit into `cluster.train.gpu_memory_gib`."""
    context_ranks: int = at_least(1, 1)
    """Ranks that share the tokens of each row, for rows too long for one: they exchange heads for attention, so the number
    must divide the model's heads. 1 keeps rows whole."""
    tensor_ranks: int = at_least(1, 1)
    """FSDP: ranks that share each matrix of a block, for blocks too large for one; they must be of one node."""
    bucket_elements: int = at_least(1, 200_000_000)
    """ZeRO: elements a bucket of reduction and prefetch. 2e8 reached the raw loop's speed on H200; DeepSpeed's default did not."""


@dataclass
class Adapter:
    kind: AdapterKind = AdapterKind.none
    r: int = at_least(1, 16)
    """Rank of the update B @ A."""
    alpha: float = at_least(0, 32.0)
    """The update is scaled by alpha / r."""
    dropout: float = at_least(0, 0.0, at_most=0.99)
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get an adapter; `all-linear` is every one but the output head."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead: a higher rank then does not learn slower (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the norm of each row of a weight apart from its direction (Liu 2024). Nearer to a full fine-tune at a low rank, for
    about a third more time."""
    base: Frozen = Frozen.full
    """How the frozen linear layers of blocks are kept: `full` in the precision of compute, `nf4` in 4 bits with double
    quantisation (QLoRA, as bitsandbytes does it), `int8` in 8 bits with a scale a row; `float8` likewise, and multiplied in 8 bits
    too, on Ada, Hopper or later: the fastest of all."""


@dataclass
class Train:
    steps: int | None = at_least(1, None)
    """Optimizer steps; null is as many as `epochs` takes."""
    epochs: float | None = at_least(0.001, None)
    """Passes over the training rows, where `steps` is null."""
    global_batch: int = at_least(1, 64)
    """Rows an optimizer step, over all ranks. Independent of the number of GPUs, so a curve does not change with them."""
    micro_batch: int | None = at_least(1, None)
    """Rows a rank holds at once, at most; the rest of its share of `global_batch` is accumulated. Null takes as many as are
    estimated to fit into `cluster.train.gpu_memory_gib`, up to 16,384 tokens: more do not make a GPU faster. One on CPUs, and
    where nobody says what a GPU has."""
    learning_rate: float = at_least(0)
    """Peak, after warmup."""
    min_lr_ratio: float = at_least(0, 0.1, at_most=1)
    """The cosine ends at this share of the peak."""
    warmup_steps: int = at_least(0, 0)
    """Steps of linear warmup."""
    weight_decay: float = at_least(0, 0.0)
    """AdamW's, on matrices only."""
    optimizer: Optimizer = Optimizer.adamw
    """`adamw_8bit` and `paged_*` take bitsandbytes under ZeRO, `adamw_8bit` torchao under FSDP; `adafactor` and `muon` (matrices
    of blocks, the rest by AdamW) need whole weights and thus FSDP. docs/adapters.md says what each costs."""
    beta1: float = at_least(0, 0.9, at_most=0.99999)
    beta2: float = at_least(0, 0.95, at_most=0.99999)
    eps: float = at_least(0, 1e-8)
    max_grad_norm: float = at_least(0, 1.0)
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    precision: Precision = Precision.auto
    """`bf16` computes in bfloat16 on fp32 master weights; `fp32` is for numerics and CPUs; `auto` is bf16 on GPUs, else fp32.
    `fp16`, with a loss scale, is for GPUs older than Ampere, which have no bfloat16."""
    float8: Float8 = Float8.none
    """Matrix products in 8 bits under FSDP, by torchao, on Hopper and later. `tensorwise` has one scale a weight, and gathers in
    8 bits too; `rowwise` one a row, nearer to bf16 and slower (13,563 and 12,003 tok/s a H200 against 10,422)."""
    activation_checkpointing: Checkpointing = Checkpointing.auto
    """What of a block is computed again in backward instead of kept. `selective` keeps attention and every second matrix product
    (8 % slower than `none` on H200), `full` only the block's input (a quarter slower), `offload` moves that to host memory.
    `auto` is the first of these that is estimated to fit into `cluster.train.gpu_memory_gib`, chosen before anything is queued;
    `full` where nobody says what a GPU has, and `none` on CPUs."""
    compile: bool | None = None
    """Compile each block by torch.compile. Null does on GPUs where triton is installed, but not for adapters under ZeRO-3, whose
    hooks inside a block cut it into pieces."""
    seed: int = at_least(0, 0)
    """Fixes initial weights and dropout."""
    max_loss_rise: float | None = at_least(0, 2.0)
    """Training whose loss (median of 21 steps) lies this far above its best, in nats, for 50 steps on end has diverged and ends;
    null lets it go on. Two nats are a perplexity 7 times the best one: nothing that heals stays up there for 50 steps."""
    profile: bool = False
    """Write a trace of three early steps by torch's profiler to RUN/profile. Those steps are slower."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write one."""
    log_every: int = at_least(1, 10)
    """Steps between lines in the log; metrics.jsonl has every step."""
    eval_every: int = at_least(0, 100)
    """Steps between evaluations on held-out rows; 0 evaluates only before the first and after the last step."""
    save_every: int = at_least(0, 500)
    """Steps between checkpoints; 0 saves only at the end or when stopped."""
    keep_checkpoints: int = at_least(1, 2)
    """Newest complete checkpoints kept; two, because the last may be the one a disk failure hits."""
    keep_every: int = at_least(0, 0)
    """Checkpoints at multiples of this many steps are kept for good, beside the newest; 0 keeps none of them."""
    async_save: bool = True
    """Copy what is saved to host memory, and write it while training goes on: ranks wait for the copy alone. On, because a
    copy takes seconds where a write takes minutes; a node without room for it is told, and waits. The last is waited for."""
    fingerprint: bool = False
    """Record each final weight's SHA-256 beside the last checkpoint, gathered one at a time, so that consolidation
    can prove its output equal to the live weights. Costs one more gather of the model."""


@dataclass
class Consolidate:
    step: int | None = at_least(1, None)
    """Checkpoint to merge, by its step; null is the newest."""
    dtype: OutputDtype = OutputDtype.auto
    """Of the merged weights; `auto` is the precision trained in, `original` each weight's own in `model.source`."""
    shard_gib: float = at_least(0.001, 5.0)
    """Largest safetensors file, in GiB."""
    adapter_only: bool = False
    """Write the adapter alone, as a PEFT folder, and leave the base as it is."""
    base: MergeBase = MergeBase.original
    """What an adapter on a quantised base is merged into: `original`, the stored weights, or `dequantised`, what it was
    trained on."""
    verify: Verify = Verify.weights
    """Before a model is called whole: `weights` reads every byte back; `logits` also loads it, and compares its logits of a
    held-out row with those that training recorded, set thus, beside its last checkpoint. Needs memory for the whole model."""


@dataclass
class Generate:
    prompts: str = MISSING
    """JSONL file with a `prompt` in each row."""
    max_new_tokens: int = at_least(1, 128)
    temperature: float = at_least(0, 0.0)
    """0 always takes the likeliest token, so that two runs can be compared."""


@dataclass
class Resources:
    """What one kind of job asks of the scheduler."""

    nodes: int = at_least(1, 1)
    ranks_per_node: int = at_least(1, 1)
    """Processes a node; one a GPU where there are GPUs."""
    gpus_per_node: int | None = at_least(0, 0)
    """Null, on `cluster=local` only: use GPUs if this machine has one for every rank, else the CPU."""
    gpu_type: str | None = None
    """Slurm's name of the GPUs to ask for, where nodes have several."""
    gpu_memory_gib: float | None = at_least(1, None)
    """Memory of one GPU, in GiB (80 GB cards have 79, an H200 has 139): what fits is chosen by it, and a run that is estimated
    to need more is refused before it is queued. Null is what this machine's have on `cluster=local`; elsewhere nothing is
    compared, because a login node cannot see the GPUs of others."""
    cpus_per_rank: int = at_least(1, 1)
    memory_gib: int | None = at_least(0, None)
    """Host memory a node; 0 is all of it, null the partition's default."""
    time_min: int = at_least(1, 60)
    """Time limit, in minutes."""
    partition: str | None = None
    """Null is the cluster's default partition."""
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes not to use, in Slurm's notation."""
    exclusive: bool = False
    """Take whole nodes."""
    sbatch: dict[str, str | None] = field(default_factory=dict)
    """Any further sbatch options by long name, such as `{reservation: night}`; null leaves out one that Muster would set,
    as in `{gpus-per-node: null, gres: "gpu:8"}`."""


@dataclass
class Network:
    interface: str = "auto"
    """Network interface of sockets. `auto` is, found on each node, the one that routes to MASTER_ADDR."""
    master_port: int | None = at_least(1024, None, at_most=65535)
    """Null derives a free port below the ephemeral range from the job id, and reserves it for the job's life."""
    nccl_timeout_s: int = at_least(1, 1800)
    """MUSTER_NCCL_TIMEOUT: seconds that start-up, or loading, may take without getting further; passed on to every library.
    A rank that is silent for longer hangs: its node's watchdog says where, ends the job, and it starts again."""
    step_timeout_s: int = at_least(1, 600)
    """Likewise for a training step, or a batch of evaluation; shorter, because a step that hangs wastes every GPU."""
    save_timeout_s: int = at_least(1, 1800)
    """Likewise for a checkpoint: long enough for the slowest disk."""


@dataclass
class Cluster:
    name: str = MISSING
    executor: Executor = MISSING
    train: Resources = field(default_factory=Resources)
    """Preflight and training."""
    cpu: Resources = field(default_factory=Resources)
    """Preprocess and consolidate: no GPU waits for them. Several ranks share the files of a merge; preprocess takes one."""
    inference: Resources = field(default_factory=Resources)
    """Evaluate and generate: one process that may spread the model over several GPUs."""
    account: str | None = None
    python: str | None = None
    """Interpreter on the compute nodes; null is the one that runs launch.py."""
    modules: list[str] = field(default_factory=list)
    """`module load` these first."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run on the first node before the ranks start; one that must succeed ends in `|| exit 2`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every rank; they win over Muster's own. No secrets here: see `secrets`."""
    secrets: list[str] = field(default_factory=list)
    """Names of variables, such as HF_TOKEN, that the job needs. Only names are written down; a value comes from the
    environment of `launch.py`, or from `secrets_file`, and is read inside the job."""
    secrets_file: str = "~/.config/muster/secrets"
    """`NAME=value` lines, readable by you alone, for secrets that the job's environment lacks."""
    scratch: str = "/tmp"
    """Folder on each node's own disk for compiler caches; shared file systems corrupt them."""
    hf_home: str | None = None
    """HF_HOME of the jobs; null leaves it as it is."""
    offline: bool = False
    """Compute nodes cannot reach the Hub: sets HF_HUB_OFFLINE=1, so that nothing waits for a time-out."""
    signal_s: int = at_least(1, 120)
    """Seconds before the time limit at which the ranks save and stop; long enough for a checkpoint. Slurm may be 60 s early."""
    requeue: bool = True
    """Start a job again that was preempted, ran into its time limit or failed, on the same id, so that what depends on it
    waits. Never after a user's error. False leaves that to `python launch.py resume=RUN`."""
    max_restarts: int = at_least(0, 3)
    """Restarts of a failing job since its last new checkpoint. Being preempted or out of time does not count."""
    network: Network = field(default_factory=Network)
    container: Container = Container.none
    """Runtime that wraps every rank; `container_image` says which image."""
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    """Paths bound into the container; the run folder always is."""
    srun_args: list[str] = field(default_factory=list)
    """Further arguments of srun, such as `--mpi=none`."""


@dataclass
class Config:
    """The whole run, as saved in RUN/config.yaml."""

    name: str = MISSING
    run_dir: str = MISSING
    """Folder of the run, created once. Relative paths start where launch.py was started."""
    jobs: list[str] = field(default_factory=list)
    """What this command runs, in order: the pipeline group sets it."""
    resume: str | None = None
    """Continue the run in this folder: jobs that have completed are skipped, training starts at its newest checkpoint."""
    dry_run: bool = False
    """Print every job's sbatch text and environment; write and submit nothing."""
    submit: Submit = Submit.submitit
    """`script` writes RUN/jobs/<job>.sbatch files for `sbatch` by hand, and submits nothing."""
    tracker: Tracker = Tracker.none
    """Where metrics go besides metrics.jsonl."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    adapter: Adapter = field(default_factory=Adapter)
    train: Train = field(default_factory=Train)
    consolidate: Consolidate = field(default_factory=Consolidate)
    generate: Generate = field(default_factory=Generate)
    cluster: Cluster = field(default_factory=Cluster)
