"""Defines the keys of `parallel`, `adapter` and `train`. `conf.schema` puts all sections together."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.choices import (
    AdapterInit,
    AdapterKind,
    Backend,
    Checkpointing,
    Float8,
    Frozen,
    Optimizer,
    Precision,
    Schedule,
)
from conf.schema_fields import SEEDS, at_least


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
