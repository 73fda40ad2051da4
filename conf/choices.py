"""Lists the values of every key that has a fixed set of them, one enumeration per key. `conf.schema` explains the values."""

from enum import Enum


class Init(Enum):
    pretrained = "pretrained"
    random = "random"


class Attention(Enum):
    auto = "auto"
    cudnn = "cudnn"
    varlen = "varlen"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"
    flash_attention_4 = "flash_attention_4"
    flex = "flex"
    sdpa = "sdpa"
    eager = "eager"


class Format(Enum):
    auto = "auto"
    alpaca = "alpaca"
    sharegpt = "sharegpt"
    messages = "messages"
    prompt_completion = "prompt_completion"
    segments = "segments"
    text = "text"
    tokenised = "tokenised"


class Mask(Enum):
    assistant = "assistant"
    last = "last"
    all = "all"


class Role(Enum):
    system = "system"
    user = "user"
    assistant = "assistant"
    tool = "tool"


class TrainOnEnd(Enum):
    turn = "turn"
    all = "all"
    last = "last"
    none = "none"


class Overlong(Enum):
    truncate = "truncate"
    split = "split"
    drop = "drop"
    error = "error"


class Order(Enum):
    auto = "auto"
    balanced = "balanced"
    random = "random"
    length = "length"
    file = "file"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    wsd = "wsd"
    inverse_sqrt = "inverse_sqrt"
    polynomial = "polynomial"
    cosine_restarts = "cosine_restarts"


class Backend(Enum):
    fsdp = "fsdp"
    zero = "zero"


class AdapterKind(Enum):
    none = "none"
    lora = "lora"


class AdapterInit(Enum):
    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    olora = "olora"


class Frozen(Enum):
    full = "full"
    nf4 = "nf4"
    int8 = "int8"
    float8 = "float8"


class Optimizer(Enum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    paged_adamw = "paged_adamw"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    muon = "muon"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Float8(Enum):
    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"


class Checkpointing(Enum):
    none = "none"
    selective = "selective"
    full = "full"
    offload = "offload"
    auto = "auto"

    @property
    def recomputes(self) -> bool:
        """Whether backward computes anything again. False for `auto`: jobs never see it, the launcher replaces it first."""
        return self not in (Checkpointing.none, Checkpointing.auto)


class OutputDtype(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    original = "original"


class Verify(Enum):
    auto = "auto"
    weights = "weights"
    logits = "logits"


class Fault(Enum):
    empty = "empty"
    looping = "looping"
    repeats = "repeats"
    template = "template"
    endless = "endless"


class MergeBase(Enum):
    original = "original"
    dequantised = "dequantised"


class SweepMerge(Enum):
    best = "best"
    all = "all"


class Executor(Enum):
    local = "local"
    slurm = "slurm"


class Runtime(Enum):
    auto = "auto"
    apptainer = "apptainer"
    singularity = "singularity"
    pyxis = "pyxis"


class ProgramLauncher(Enum):
    srun = "srun"
    torchrun = "torchrun"
    accelerate = "accelerate"
    ray = "ray"


class Submit(Enum):
    submitit = "submitit"
    script = "script"


class Where(Enum):
    here = "here"
    job = "job"
