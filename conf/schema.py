"""Defines every config key: one dataclass per section, and under each field what it means, its unit and why it has its default.

Values that belong to one choice (a model, a layout, a cluster) are in the YAML files of this folder. Values that nearly
everybody wants are defaults here. No value is in both places.

Long because it is the one list of all keys.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from conf.choices import (
    AdapterInit,
    AdapterKind,
    Attention,
    Backend,
    Checkpointing,
    Executor,
    Fault,
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
    ProgramLauncher,
    Role,
    Runtime,
    Schedule,
    Submit,
    SweepMerge,
    TrainOnEnd,
    Verify,
    Where,
)


def at_least(minimum: float, default: Any = MISSING, *, at_most: float = inf) -> Any:
    """A number with bounds. `launcher.check.rules` reads them from the field's metadata."""
    return field(default=default, metadata={"minimum": minimum, "maximum": at_most})


SEEDS = 2**32 - 1
"""The largest seed that numpy takes."""


def entries(section: type) -> Any:
    """A dictionary of sections under names that the user chooses. `conf.resolve` converts each entry to `section`."""
    return field(default_factory=dict, metadata={"section": section})


def free_text(default: Any = MISSING, *, factory: Any = None) -> Any:
    """A text for the model, tokenizer or trackers, which may have any characters. `conf.text` refuses some in all other texts."""
    metadata = {"text": "free"}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass
class Architecture:
    """The fields of a Hugging Face config.json that define a model's shape: enough to build it and to estimate its memory."""

    model_type: str = MISSING
    """Name of the model family in transformers, for example `llama` or `qwen2`."""
    vocab_size: int = at_least(1)
    """Tokens of the vocabulary: rows of the embedding and of the output head."""
    hidden_size: int = at_least(1)
    intermediate_size: int = at_least(1)
    """Width of the MLP in each block."""
    num_hidden_layers: int = at_least(1)
    """Number of decoder blocks."""
    num_attention_heads: int = at_least(1)
    num_key_value_heads: int = at_least(1)
    max_position_embeddings: int = at_least(1)
    """Longest sequence that the model was made for, in tokens."""
    tie_word_embeddings: bool = False
    """Whether the output head uses the weights of the embedding."""
    tower_gib: float = at_least(0, 0.0)
    """GiB of the weights that a multimodal model has beside its text. They are not loaded; a merge copies them."""
    extra: dict[str, Any] = free_text(factory=dict)
    """Any other fields of config.json, passed on unchanged (rope parameters, head_dim, biases)."""


@dataclass
class Model:
    name: str = MISSING
    """Short name, used in the name of the run."""
    source: str = MISSING
    """Hub id or folder with the weights, the config and the tokenizer."""
    revision: str | None = None
    """Commit, tag or branch on the Hub. Set a commit if the run must be repeatable."""
    tokenizer: str | None = None
    """Hub id or folder of a tokenizer to use instead of the one in `source`."""
    init: Init = Init.pretrained
    """`pretrained`: read the weights from `source`. `random`: build `architecture` with new weights (demo, benchmarks)."""
    ignore_tensors: list[str] = field(default_factory=list)
    """Regular expressions for names of stored tensors that training does not need, such as layers that predict several tokens
    (`["^mtp[.]"]`). They are not loaded, and a merge copies them from `source` as they are."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, because that code runs with your permissions."""
    attention: Attention = Attention.auto
    """Attention kernel. `auto`: the fastest kernel of torch that model, GPU and `data.packing` allow; the log names it. That
    is `cudnn` for rows of one sample on Hopper and later, and `varlen` for packed rows. `flash_attention_*` need their package."""
    architecture: Architecture | None = None
    """Shape of the model, for checks and memory estimates before anything is queued. Null: read from config.json, if it is on this
    machine. `init: random` needs it."""


@dataclass
class DataSet:
    """One of several sets of training rows, as in `data.sets.NAME.path=...`."""

    path: str = MISSING
    """Like `data.path`."""
    subset: str | None = None
    """Like `data.subset`."""
    revision: str | None = None
    """Like `data.revision`."""
    files: list[str] = field(default_factory=list)
    """Like `data.files`."""
    split: str | None = None
    """Like `data.split`."""
    format: Format | None = None
    """Like `data.format`. Null: the value of `data.format`."""
    fields: dict[str, str] = free_text(factory=dict)
    """Like `data.fields`. Empty: the value of `data.fields`."""
    roles: dict[str, str] = free_text(factory=dict)
    """Like `data.roles`. Empty: the value of `data.roles`."""
    ignore: list[str] = free_text(factory=list)
    """Like `data.ignore`. Empty: the value of `data.ignore`."""
    weight: float = at_least(0.0001, 1.0)
    """How often each row is used in an epoch. 2: twice. 0.5: a random half of the rows, chosen by `data.seed`."""
    num_samples: int | None = at_least(1, None, at_most=1e9)
    """Rows of this set per epoch, used instead of `weight`: a random subset, or the set repeated as often as needed."""


@dataclass
class Gates:
    """Limits on bad rows. Each is a share of all rows, from 0 to 1. Preprocess stops if more rows than that are bad.

    Below its limit, bad rows are counted and shown, and preprocess continues. Rows that cannot be used are then left out.
    1 never stops.
    """

    unreadable: float = at_least(0, 0.0, at_most=1)
    """Lines that are not JSON, not UTF-8, or not an object with named columns."""
    unusable: float = at_least(0, 0.0, at_most=1)
    """Rows that do not match the format: a column is missing or null, a text is not a string, or the chat template raises an
    error for the turns."""
    roles: float = at_least(0, 0.0, at_most=1)
    """Rows with an unknown speaker. `data.roles` maps names of speakers."""
    empty: float = at_least(0, 0.0, at_most=1)
    """Rows with an empty question or answer."""
    unwritten: float = at_least(0, 0.0, at_most=1)
    """Rows with tools, documents or names that the chat template does not write. A row with a text, a thought or a call that it
    does not write is `unusable`."""
    overlong: float = at_least(0, 0.2, at_most=1)
    """Rows longer than `data.max_length` that are truncated or dropped. With `data.overlong=split` nothing is lost, so this
    limit does not apply."""
    untrained: float = at_least(0, 0.05, at_most=1)
    """Rows without a trained token, for example because the answer was cut off. They are left out."""
    endless: float = at_least(0, 0.05, at_most=1)
    """Rows that were not truncated, but whose last trained token does not end a turn or the text. A model that never sees an
    end token never stops generating."""
    placeholders: float = at_least(0, 0.02, at_most=1)
    """Rows with an unfilled template placeholder, for example {instruction} or {{ name }}."""
    vocabulary: float = at_least(0, 0.0, at_most=1)
    """Rows of token ids (`data.format=tokenised`) with an id that the tokenizer does not have. They are left out."""
    duplicates: float = at_least(0, 0.2, at_most=1)
    """Training rows with the same tokens as an earlier row. `data.drop_duplicates` removes them."""
    overlap: float = at_least(0, 0.01, at_most=1)
    """Validation rows that are also training rows. Their loss says little."""


@dataclass
class Data:
    name: str = MISSING
    """Short name, used in the name of the run."""
    path: str | None = MISSING
    """Training rows: a file (JSON, JSONL, Parquet, Arrow, CSV, TSV, text; also .gz, .bz2, .xz, .zst), a folder or glob pattern of
    such files, an address (https, hf, s3, gs), or a Hub id: `owner/name` or `owner/name:train[:100]`."""
    subset: str | None = None
    """Subset of a Hub data set, also called its config name. With LLaMA-Factory's `dataset_info.json` as path: the set's name."""
    revision: str | None = None
    """Commit, tag or branch of a Hub data set. Set a commit if the run must be repeatable."""
    files: list[str] = field(default_factory=list)
    """Files to read in a Hub data set or a folder, as glob patterns. Empty: all that belong to the split."""
    split: str | None = None
    """Range of rows to use, in the notation of Python and the Hub: `[:1000]`, `[10%:]`, `[-100:]`."""
    sets: dict[str, Any] = entries(DataSet)
    """Several training sets instead of `path`. Each has a name, a path and a weight."""
    format: Format = Format.auto
    """Format of the rows. `auto` recognizes it from the columns and logs which one it is."""
    fields: dict[str, str] = free_text(factory=dict)
    """Maps columns with other names: the format's column to your column, or to a Jinja template of the row
    ("{{ title }}: {{ body }}"). `role`, `content` and the other keys of a message map in the same way. "name?": rows may lack
    it."""
    roles: dict[str, str] = free_text(factory=dict)
    """Maps speakers with other names: your name to system, user, assistant or tool."""
    ignore: list[str] = free_text(factory=list)
    """Columns, and keys of messages, to read as if the rows did not have them."""
    split_thinking: bool = False
    """Take `<think>...</think>` out of the answers, and give it to the chat template as the thought (`reasoning_content`)."""
    chat_template: str | None = None
    """chatml, gemma, llama3, mistral, qwen, or the path of a Jinja file. Null: the tokenizer's own. It is saved with the
    consolidated model."""
    template_kwargs: dict[str, Any] = free_text(factory=dict)
    """Values for variables of the chat template, for example `{enable_thinking: false}`. A row's own `chat_template_kwargs` win."""
    mask: Mask = Mask.assistant
    """Which part of a chat is trained. `assistant`: every turn of the roles in `train_on`. `last`: the last of these turns.
    `all`: everything. If a turn has a `train` field, its value is used instead."""
    train_on: list[Role] = field(default_factory=lambda: [Role.assistant])
    """Roles whose turns are trained."""
    train_on_end: TrainOnEnd = TrainOnEnd.turn
    """Which tokens that end a turn are trained. `turn`: those of trained turns. `all`: those of every turn. `last`: the last one
    of the chat. `none`: none of them."""
    end_of_turn: list[str] = free_text(factory=list)
    """Tokens that end a turn of this chat template. Empty: those of the known model families and the end-of-text token."""
    eos_token: str | None = free_text(None)
    """Token that ends a text, and at which generation stops. Null: the tokenizer's own."""
    pad_token: str | None = free_text(None)
    """Token that pads rows. Null: the tokenizer's own, or its end-of-text token if it has none."""
    special_tokens: list[str] = free_text(factory=list)
    """Additional tokens that are never split, for example `<|im_start|>`. The embedding grows if the model has no rows for
    them."""
    validation_path: str | None = None
    """Validation rows, written as in `path`. Null: `validation_fraction` of the training rows."""
    validation_split: str | None = None
    """Range of rows of `validation_path`, written as in `split`. It may be a range of the training file."""
    validation_fraction: float = at_least(0, 0.05, at_most=0.5)
    """Share of the rows that is used for validation if there is no `validation_path`. At least one row is held out; 0 holds
    out nothing, and there is then no held-out loss. Rows are chosen by their content and
    `seed`: equal rows are never in both parts. If rows are added to the file, the others stay where they are."""
    max_length: int = at_least(2, 2048, at_most=100_000_000)
    """Longest row, in tokens."""
    overlong: Overlong = Overlong.truncate
    """What to do with a sample longer than `max_length`. `truncate`: cut it. `split`: continue it in further samples. `drop`:
    leave it out. `error`: stop. All cases are counted."""
    packing: bool = False
    """Put several samples into each row of `max_length` tokens. Attention stays inside each sample. `train.global_batch` then
    counts full rows."""
    order: Order = Order.auto
    """Order of the rows in an epoch. `balanced`: random, but all rows of a step take about the same time, so that ranks do not
    wait for each other. `random`: no balancing. `length`: random, but neighboring steps have rows of similar length, which
    need less padding (a Trainer's `group_by_length`). `file`: the order of the input, for a curriculum. `auto`: `balanced` for
    packed rows, else `random`, because a step of only short samples would give their tokens more weight."""
    pad_to_max: bool = False
    """Pad every training row to `max_length`, so that all steps need the same memory."""
    drop_duplicates: bool = False
    """Keep only the first of training rows with the same tokens."""
    max_rows: int | None = at_least(1, None)
    """Use only this many rows from the start of each set, for a quick look at the data. Null: all rows."""
    preview: int = at_least(0, 1)
    """Samples to show in the log as the model sees them. RUN/data/preview.html and preview.jsonl have more."""
    workers: int | None = at_least(1, None)
    """Processes that tokenize. Null: one for each CPU core of the preprocess job (`cluster.cpu.cpus_per_rank`)."""
    cache: str | None = None
    """Folder for tokenized sets. Runs share them; they are named by a hash of their content. Null: `.data` next to the
    run folder. `$NAME` is expanded on the node."""
    seed: int = at_least(0, 0, at_most=SEEDS)
    """Seed for the choice of validation rows, for subsets of sets, and for the order of training rows."""
    gates: Gates = field(default_factory=Gates)


@dataclass
class Parallel:
    name: str = MISSING
    """Name of the layout, used in the name of the run."""
    backend: Backend = MISSING
    """Library that shards: `fsdp` (torch FSDP2) or `zero` (DeepSpeed ZeRO)."""
    shard_ranks: int | None = at_least(1, None)
    """FSDP: ranks that together hold one sharded copy of the model. Null: all ranks. 1: plain data parallelism (ddp). The
    ranks of one node: HSDP, which keeps the traffic of parameters inside the node."""
    zero_stage: int = at_least(0, 0)
    """ZeRO stage. 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory and run the optimizer there. Slower; for models that do not fit otherwise."""
    offload_parameters: bool = False
    """Keep sharded parameters in host memory while they are not used."""
    reshard_after_forward: bool | None = None
    """FSDP: free gathered parameters after forward. False needs more memory, but gathers once per step instead of twice. Null:
    false if it is estimated to fit into `cluster.train.gpu_memory_gib`, else true."""
    context_ranks: int = at_least(1, 1)
    """Context parallelism: ranks that share the tokens of each row, for rows that are too long for one rank. They exchange
    attention heads, so this must divide the model's number of heads. 1: off."""
    tensor_ranks: int = at_least(1, 1)
    """Tensor parallelism, with FSDP only: ranks of one node that share each matrix of a block, for blocks that are too large
    for one rank. 1: off."""
    bucket_elements: int = at_least(1, 200_000_000)
    """ZeRO: elements in each bucket for reduction and prefetch. On H200s, 2e8 reached the speed of a training loop without
    Muster; DeepSpeed's default did not."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """ZeRO: settings of DeepSpeed under its own names, for example `zero_optimization.stage3_max_live_parameters`. They replace
    those that Muster sets; docs/memory.md says which. What a key of Muster decides (stage, batch, precision) must be the same."""
    deepspeed_config: str | None = None
    """ZeRO: a DeepSpeed JSON file. launch.py reads it into `deepspeed`; values given in `deepspeed` itself win."""


@dataclass
class Adapter:
    kind: AdapterKind = AdapterKind.none
    """`none`: train all weights. `lora`: freeze the base and train a low-rank update."""
    source: str | None = None
    """Go on from this adapter: a folder in PEFT's format, or a Hub id whose files are in the cache. Rank, alpha, targets and the
    like are then those of its adapter_config.json."""
    r: int = at_least(1, 16, at_most=65_536)
    """Rank of the update B @ A."""
    alpha: float = at_least(1e-6, 32.0, at_most=1e6)
    """The update is scaled by alpha / r. With 0 nothing would be trained."""
    dropout: float = at_least(0, 0.0, at_most=0.99)
    """Dropout on the input of the adapter, as a probability."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get an adapter. `all-linear`: all except the output head."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers, as in PEFT: the end of a layer's name, or a regular expression for it, and its rank, for example
    `{down_proj: 32, "layers.0.self_attn.q_proj": 8}`. The first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other values of alpha, written in the same way."""
    layers_to_transform: list[int] = field(default_factory=list)
    """Numbers of the decoder blocks that get adapters, from 0. Empty: all."""
    modules_to_save: list[str] = field(default_factory=list)
    """Layers that are trained whole beside the adapters, by the end of their names: usually `[embed_tokens,lm_head]`, which new
    tokens need. They take as much memory as in a full fine-tune."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead, so that a higher rank does not learn more slowly (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the norm of each row of a weight separately from its direction (Liu 2024). At a low rank this is closer to a full
    fine-tune, and takes about a third more time."""
    init: AdapterInit = AdapterInit.default
    """Where new adapters begin (PEFT's `init_lora_weights`). `default`: A uniform, B zero. `gaussian`: A normal. `pissa`: with the
    largest singular values of each weight (Meng 2024). `olora`: with its first orthogonal columns (Büyükakyüz 2024). Both are
    taken off the frozen base, in the merge too, and need a base that is not quantized."""
    lora_plus_ratio: float | None = at_least(1e-6, None, at_most=10_000)
    """Learning rate of the matrices B as a multiple of `train.learning_rate` (LoRA+, Hayou 2024; 16 is usual there). Null: 1."""
    base: Frozen = Frozen.full
    """Precision of the frozen linear layers in blocks. `full`: the compute precision. `nf4`: 4 bits with double quantization
    (QLoRA as in bitsandbytes). `int8`: 8 bits with one scale per row. `float8`: 8 bits with one scale per row, and also
    multiplied in 8 bits; needs Ada, Hopper or later, and is the fastest."""


@dataclass
class EarlyStopping:
    patience: int | None = at_least(1, None)
    """End training after this many evaluations in a row that did not improve the held-out loss. The checkpoint with the best loss
    is kept: `consolidate.step=best` merges it. Null: train to the end."""
    min_delta: float = at_least(0, 0.0)
    """An evaluation improves the loss only if it is lower by more than this, in nats."""


@dataclass
class Train:
    steps: int | None = at_least(1, None, at_most=1_000_000_000)
    """Optimizer steps. Null: as many as `epochs` takes."""
    epochs: float | None = at_least(0.001, None, at_most=100_000)
    """Passes over the training rows. Used if `steps` is null."""
    global_batch: int = at_least(1, 64, at_most=10_000_000)
    """Rows per optimizer step over all ranks. It does not depend on the number of GPUs, so neither does the loss curve."""
    micro_batch: int | None = at_least(1, None, at_most=1_000_000)
    """Most rows in one forward pass of a rank. Gradients are accumulated until `global_batch` is reached. Null: as many as are
    estimated to fit into `cluster.train.gpu_memory_gib`, up to 16,384 tokens, because more do not make a GPU faster; 1 on CPUs
    and if `gpu_memory_gib` is not set."""
    learning_rate: float = at_least(1e-20, at_most=100)
    """Peak learning rate, after warmup. With 0 nothing would be trained."""
    lr_schedule: Schedule = Schedule.cosine
    """How the learning rate falls after the warmup. `cosine`, `linear`, `polynomial`: over all steps. `cosine_restarts`: in
    `lr_cycles` cosines, each from the peak. `wsd`: the peak, then a cosine over the last `decay_ratio` of the steps.
    `inverse_sqrt`: with the root of the steps. `constant_with_warmup`: not at all. `constant`: the same without a warmup."""
    min_lr_ratio: float = at_least(0, 0.1, at_most=1)
    """The learning rate never falls below this share of the peak. transformers uses 0."""
    warmup_steps: int | None = at_least(0, None)
    """Steps of linear warmup. Null: as `warmup_ratio` says."""
    warmup_ratio: float | None = at_least(0, None, at_most=0.99)
    """Linear warmup as a share of all steps. If it and `warmup_steps` are null: 10 steps, but at most a tenth of the training."""
    lr_cycles: int = at_least(1, 2, at_most=1_000_000)
    """Cosines of `lr_schedule=cosine_restarts`."""
    lr_power: float = at_least(0, 1.0, at_most=1000)
    """Exponent of `lr_schedule=polynomial`. 1 is linear."""
    decay_ratio: float = at_least(0, 0.1, at_most=1)
    """Share of all steps in which the learning rate of `lr_schedule=wsd` falls."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Other peaks for some weights: a regular expression that is found in their names, and their rate, for example
    `{embed_tokens: 1e-6}`. The first that matches counts."""
    unfrozen: list[str] = field(default_factory=list)
    """Train only the weights in whose names one of these regular expressions is found, for example `[layers.31, lm_head]`.
    Empty: all."""
    label_smoothing: float = at_least(0, 0.0, at_most=0.99)
    """Share of the target that is spread over the whole vocabulary (Szegedy 2016). The logged loss contains it, the held-out
    loss does not."""
    neftune_alpha: float | None = at_least(0, None, at_most=10_000)
    """Noise on the embeddings while training, as a Trainer adds it (NEFTune, Jain 2023). 5 is usual. Null: none."""
    weight_decay: float = at_least(0, 0.0, at_most=100)
    """Weight decay of AdamW. Applied to matrices only."""
    optimizer: Optimizer = Optimizer.adamw
    """`adamw_8bit`: from bitsandbytes with ZeRO, from torchao with FSDP. `paged_*`: from bitsandbytes, with ZeRO only.
    `adafactor` and `muon` (matrices in blocks; AdamW for the rest): with FSDP only, because they need whole matrices.
    docs/adapters.md lists what each costs."""
    beta1: float = at_least(0, 0.9, at_most=0.99999)
    """Decay of AdamW's first moment."""
    beta2: float = at_least(0, 0.95, at_most=0.99999)
    """Decay of AdamW's second moment."""
    eps: float = at_least(1e-30, 1e-8, at_most=1)
    """AdamW's epsilon. With 0, a weight whose gradient has always been 0 would become NaN."""
    max_grad_norm: float = at_least(0, 1.0, at_most=1e9)
    """Clip gradients to this global norm. 0: no clipping."""
    precision: Precision = Precision.auto
    """Compute precision. `bf16`: bfloat16, with fp32 master weights. `fp32`: to study numerics, and for CPUs. `fp16`: with loss
    scaling, for GPUs before Ampere, which have no bfloat16. `auto`: `bf16` if the GPUs of all ranks have it, else `fp16`; `fp32`
    on CPUs. Preflight or train decides it on the nodes, logs it, and RUN/precision.json keeps it."""
    tf32: bool = False
    """Round the factors of fp32 matrix products to TF32 (10 bits of mantissa), on Ampere or later. With bf16 or fp16 it matters
    only for the few products that stay in fp32."""
    float8: Float8 = Float8.none
    """Matrix products in 8 bits, by torchao, with FSDP on Ada, Hopper or later. `tensorwise`: one scale per weight, and weights
    are also gathered in 8 bits (13,563 tok/s per H200). `rowwise`: one scale per row, closer to bf16 (12,003 tok/s). `none`:
    10,422 tok/s."""
    activation_checkpointing: Checkpointing = Checkpointing.auto
    """Which activations of a block are recomputed in backward instead of kept. `none`: nothing is recomputed. `selective`:
    keeps attention and every second matrix product (8 % slower than `none` on H200). `full`: keeps only the input of the block
    (a quarter slower). `offload`: like `full`, with these inputs in host memory. `auto`: the first of these that is estimated
    to fit into `cluster.train.gpu_memory_gib`, chosen before the job is queued; `full` if that is not set; `none` on CPUs."""
    reentrant_checkpointing: bool = False
    """Recompute in torch's older way, with `activation_checkpointing=full`: a backward inside of backward. The gradients are the
    same. It computes a little more; use it only if a model fails without."""
    compile: bool | None = None
    """Compile each block with torch.compile. Null: yes on GPUs if triton is installed, except for adapters with ZeRO-3, whose
    hooks inside a block would break its graph into small parts."""
    seed: int = at_least(0, 0, at_most=SEEDS)
    """Seed for random initial weights and dropout."""
    max_loss_rise: float | None = at_least(0, 2.0)
    """In nats. Training has diverged, and ends, if the loss (median of 21 steps) stays this far above its best for 50 steps in a
    row. Null: no such check. The default of 2 nats is a perplexity 7 times the best: runs that recover do not stay there
    for 50 steps."""
    profile: bool = False
    """Write a trace of three early steps to RUN/profile with torch's profiler. These steps are slower."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write a trace."""
    resume_step: int | None = at_least(1, None)
    """With `muster resume RUN`: the step of the checkpoint to go on from. Newer checkpoints are kept in RUN/checkpoints/replaced-N.
    It counts once, for the launch that names it. Null: the newest checkpoint."""
    log_every: int = at_least(1, 10)
    """Steps between lines in the log. metrics.jsonl has every step."""
    eval_every: int | None = at_least(0, None)
    """Steps between evaluations on the validation rows. 0: only before the first and after the last step. Null:
    `evals_per_epoch`, or 100 if that is null too."""
    evals_per_epoch: int | None = at_least(1, None)
    """Evaluations in an epoch, evenly spaced, instead of `eval_every`."""
    save_every: int | None = at_least(0, None)
    """Steps between checkpoints. 0: save only at the end, or when the job is asked to stop. Null: `saves_per_epoch`, or 500 if
    that is null too."""
    saves_per_epoch: int | None = at_least(1, None)
    """Checkpoints in an epoch, evenly spaced, instead of `save_every`."""
    keep_checkpoints: int = at_least(1, 2)
    """Number of newest complete checkpoints to keep. Two, because a disk failure may damage the last one."""
    keep_best: bool = False
    """Also save and keep the checkpoint with the lowest held-out loss. On with `early_stopping.patience` and
    `consolidate.step=best`."""
    keep_every: int = at_least(0, 0)
    """Never delete checkpoints at multiples of this many steps. 0: off."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    async_save: bool = True
    """Copy the training state to host memory and write it to disk while training continues. Ranks wait only for the copy, which
    takes seconds where writing takes minutes. If a node has too little memory for the copy, the log says so and ranks wait
    for the write. Training always waits for the last checkpoint."""
    fingerprint: bool = False
    """Record the SHA-256 of each final weight with the last checkpoint, so that consolidation can prove that its output equals
    the trained weights. Gathers every weight once more, one at a time."""


@dataclass
class Consolidate:
    step: int | str | None = None
    """Step of the checkpoint to consolidate. `best`: the one with the lowest held-out loss. Null: the newest."""
    dtype: OutputDtype = OutputDtype.auto
    """Precision of the consolidated weights. `auto`: the compute precision of training. `original`: that of each weight in
    `model.source`."""
    shard_gib: float = at_least(0.001, 5.0, at_most=100_000)
    """Largest safetensors file, in GiB."""
    adapter_only: bool = False
    """Write only the adapter, as a PEFT folder, instead of merging it into the base."""
    base: MergeBase = MergeBase.original
    """Weights that an adapter with a quantized base is merged into. `original`: the stored weights. `dequantised`: the
    quantized weights that it was trained on, converted back."""
    verify: Verify = Verify.auto
    """Check before the model folder counts as complete. `weights`: read every byte back. `logits`: also load the model, and
    compare its logits with those of training, for a validation row, or a training row if nothing is held out. Set it before
    training, which then stores them with its last checkpoint. Needs memory for the whole model. `auto`: a full fine-tune
    stores them too, and they are compared if the model takes at most 8 GiB; of a larger model, its first blocks are compared."""


@dataclass
class Generate:
    prompts: str = MISSING
    """JSONL file with a `prompt`, or `messages` of several turns, in each row, and maybe a `reference` answer."""
    system: str | None = free_text(None)
    """System prompt of rows that have none."""
    max_new_tokens: int = at_least(1, 128, at_most=10_000_000)
    """Longest answer, in tokens."""
    temperature: float = at_least(0, 0.0, at_most=100)
    """0: always the most likely token, so that two runs can be compared."""
    top_p: float = at_least(0.001, 1.0, at_most=1)
    """With a temperature above 0: choose among the most likely tokens whose probabilities reach this sum. 1: among all."""
    seed: int = at_least(0, 0, at_most=SEEDS)
    """Seed of the choice, with a temperature above 0."""
    compare_base: bool = False
    """Also write the answers of `model.source`, beside those of the trained model."""
    fail_on: list[Fault] = field(default_factory=list)
    """Fail the job if an answer is `empty`, ends in a loop (`looping`), `repeats` the question, has tokens of the chat template
    inside (`template`), or has not ended (`endless`). Empty: only count them."""


@dataclass
class Resources:
    """What one kind of job asks Slurm for."""

    nodes: int = at_least(1, 1)
    ranks_per_node: int = at_least(1, 1)
    """Processes per node. With GPUs, one for each GPU. 0, with `cluster=local` only: one for each GPU of this machine; two
    if it has none."""
    gpus_per_node: int | None = at_least(0, 0)
    """GPUs per node. Null, with `cluster=local` only: one for each rank if this machine has GPUs, else the CPU."""
    gpu_type: str | None = None
    """Slurm's name of the GPU type to ask for, on clusters with several types."""
    gpu_memory_gib: float | None = at_least(1, None)
    """Memory of one GPU, in GiB (an 80 GB card has 79, an H200 has 139). Muster chooses settings that fit into it, and refuses a
    run that is estimated to need more before it is queued. Null: with `cluster=local`, the memory of this machine's GPUs;
    else nothing is compared, because a login node cannot see the GPUs of compute nodes."""
    cpus_per_rank: int = at_least(1, 1)
    memory_gib: int | None = at_least(0, None)
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
    """Restarts after failures since the last new checkpoint. Preemption and time limits do not count."""
    network: Network = field(default_factory=Network)
    container: Container = field(default_factory=Container)
    srun_args: list[str] = field(default_factory=list)
    """Additional arguments for srun, for example `--mpi=none`."""


@dataclass
class Tracker:
    """Where metrics go in addition to metrics.jsonl. `tracker=wandb`, or several: `tracker=[wandb,tensorboard]`."""

    wandb: bool = False
    """Weights & Biases. WANDB_API_KEY comes from `wandb login` or `cluster.secrets`."""
    tensorboard: bool = False
    """Event files in RUN/tensorboard."""
    mlflow: bool = False
    """MLflow, at `uri`."""
    comet: bool = False
    """Comet. COMET_API_KEY comes from `cluster.secrets`."""
    project: str = "muster"
    """Project of W&B and Comet, experiment of MLflow."""
    entity: str | None = None
    """Team of W&B, workspace of Comet. Null: your own."""
    run_name: str | None = None
    """Name of the run there. Null: the name of the run folder."""
    group: str | None = None
    """Group of runs in W&B, a tag `group` elsewhere."""
    tags: list[str] = field(default_factory=list)
    notes: str | None = free_text(None)
    """A text about the run."""
    uri: str | None = None
    """Address of the MLflow server, or a folder for it. Null: MLFLOW_TRACKING_URI, else the folder RUN/mlruns."""


@dataclass
class Hub:
    """The Hugging Face Hub around a run. docs/hub.md has the steps."""

    push: str | None = None
    """Repository `owner/name` that gets RUN/model, with its card, once it is consolidated and verified. With
    `consolidate.adapter_only` that is the adapter. Null: nothing leaves the cluster."""
    private: bool = True
    """Create that repository as a private one. A repository that is public already is refused, unless this is false."""
    revision: str | None = None
    """Branch to push to. It is created if there is none. Null: main."""
    tag: str | None = None
    """Tag for the commit that was pushed."""
    token: str | None = None
    """Name of the environment variable with the token that may write there; its value comes from the environment of
    `launch.py` or from `cluster.secrets_file`. Null: HF_TOKEN, else the token of `hf auth login`."""
    where: Where = Where.here
    """Where `pipeline=fetch` and `muster push` work. `here`: on this machine, for example a login node. `job`: in a job with
    the resources of `cluster.cpu`, for which `cluster.cpu.partition` may name a partition with network."""
    check: bool = True
    """Before anything is queued, ask the Hub whether the token may read and write there. With `cluster.offline`, look instead
    whether the cache has the files."""


@dataclass
class Custom:
    """A training program of your own: `pipeline=custom custom.command="python train.py"`. See docs/own-trainer.md."""

    command: str | None = None
    """The program and its arguments, as one line, not run by a shell. Variables such as `$MUSTER_CHECKPOINTS` are replaced on the
    compute node. `python` is `cluster.python`."""
    launcher: ProgramLauncher = ProgramLauncher.srun
    """What starts the ranks. `srun`: Slurm starts the program once for each rank. `torchrun`, `accelerate`: Slurm starts one
    torchrun or `accelerate launch` on each node, which starts the ranks of the node. `ray`: Slurm starts Ray on all nodes, and the
    program once, on the first."""
    folder: str | None = None
    """Folder in which the program starts. Null: the one in which launch.py was started."""


@dataclass
class Sweep:
    """Several runs from one command: `muster sweep KEY=a,b`. See docs/sweeps.md."""

    at_once: int | None = at_least(1, None, at_most=100_000)
    """Trainings of the sweep that Slurm runs at the same time. Null: as many as there is room for. With `cluster=local` it is
    always one."""
    stop_worst: str | None = None
    """`0.5@25%`: after 25 % of its steps, a training ends if its loss is not among the better half of those that have come as
    far. Null: all train to the end."""
    merge: SweepMerge = SweepMerge.best
    """Which runs are consolidated, evaluated and so on. `best`: when all trainings have ended, the one with the lowest loss of
    those that were trained to the end. `all`: each, as soon as it is trained. The loss is the held-out one; the training loss
    where nothing is held out."""


@dataclass
class Config:
    """The whole config of a run, as stored in RUN/config.yaml."""

    name: str = MISSING
    """Name of the run. Slurm jobs are named after it."""
    run_dir: str = MISSING
    """Folder of the run. Created once. A relative path starts at the folder in which launch.py is started."""
    jobs: list[str] = field(default_factory=list)
    """Jobs that this command runs, in order. The pipeline group sets it."""
    resume: str | None = None
    """Continue the run in this folder. Completed jobs are skipped; training continues at its newest checkpoint."""
    dry_run: bool = False
    """Print the sbatch script and environment of every job. Write and submit nothing."""
    submit: Submit = Submit.submitit
    """`submitit`: submit the jobs. `script`: write RUN/jobs/<job>.sbatch files for `sbatch`, and submit nothing."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    adapter: Adapter = field(default_factory=Adapter)
    train: Train = field(default_factory=Train)
    consolidate: Consolidate = field(default_factory=Consolidate)
    generate: Generate = field(default_factory=Generate)
    tracker: Tracker = field(default_factory=Tracker)
    hub: Hub = field(default_factory=Hub)
    custom: Custom = field(default_factory=Custom)
    sweep: Sweep = field(default_factory=Sweep)
    cluster: Cluster = field(default_factory=Cluster)
