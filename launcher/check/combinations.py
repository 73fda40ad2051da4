"""Options that do not go together: adapter, optimizer and precision with each other and with the layout; pure."""

from collections.abc import Iterator

from conf.choices import AdapterKind, Backend, Float8, Frozen, Init, MergeBase, Optimizer, Precision, Verify
from conf.errors import Problem
from conf.schema import Config

BITSANDBYTES = (Optimizer.adamw_8bit, Optimizer.paged_adamw, Optimizer.paged_adamw_8bit)
PAGED = (Optimizer.paged_adamw, Optimizer.paged_adamw_8bit)
WHOLE = (Optimizer.adafactor, Optimizer.muon)
"""Optimizers that look at a matrix as a whole."""


def problems(config: Config) -> Iterator[Problem]:
    """Each pair by the values that make it, with what to take instead."""
    yield from _adapter(config)
    yield from _optimizer(config)
    yield from _precision(config)


def _adapter(config: Config) -> Iterator[Problem]:
    adapter, parallel = config.adapter, config.parallel
    if adapter.kind is AdapterKind.none:
        for key, off in (("dora", False), ("rslora", False), ("base", Frozen.full)):
            if (value := getattr(adapter, key)) is not off:
                shown = value.name if isinstance(value, Frozen) else value
                yield Problem(f"adapter.{key}", shown, "goes with an adapter: take adapter=lora")
        return
    small = adapter.base is not Frozen.full
    if adapter.dora and parallel.backend is Backend.zero and parallel.zero_stage == 3:
        said = "reads base weights after ZeRO-3 has given them back: take parallel=fsdp or parallel=zero2"
        yield Problem("adapter.dora", True, said)
    if adapter.dora and small:
        said = f"needs the norms of weights that adapter.base={adapter.base.name} packs: set one of the two back"
        yield Problem("adapter.dora", True, said)
    if small and config.model.init is Init.random:
        said = "quantises stored weights, and model.init=random has none: take adapter=lora, or a model folder"
        yield Problem("adapter.base", adapter.base.name, said)
    if config.consolidate.base is MergeBase.dequantised and adapter.base is not Frozen.nf4:
        said = f"is for adapter.base=nf4, and this is {adapter.base.name}: take original"
        yield Problem("consolidate.base", "dequantised", said)
    if config.consolidate.verify is Verify.logits and small and config.consolidate.base is not MergeBase.dequantised:
        said = f"compares with a model on an {adapter.base.name} base, which the merged one is not: take weights"
        yield Problem("consolidate.verify", "logits", said + " or base=dequantised" * (adapter.base is Frozen.nf4))


def _optimizer(config: Config) -> Iterator[Problem]:
    kind, parallel = config.train.optimizer, config.parallel
    zero = parallel.backend is Backend.zero
    if kind is Optimizer.adamw:
        return
    if zero and kind in WHOLE:
        said = "needs whole matrices, and ZeRO gives its optimizer flat pieces: take parallel=fsdp, hsdp or ddp"
        yield Problem("train.optimizer", kind.name, said)
    if not zero and kind in PAGED:
        said = "is bitsandbytes', which cannot update FSDP's tensors: take adamw_8bit (torchao), or parallel=zero2"
        yield Problem("train.optimizer", kind.name, said)
    if kind in PAGED and config.cluster.train.gpus_per_node == 0:
        yield Problem("train.optimizer", kind.name, "pages GPU memory, and no GPU is asked for: take adamw")
    if parallel.offload_optimizer:
        said = "keeps small state on the GPU, and parallel.offload_optimizer keeps it on the host: take adamw, or no offload"
        yield Problem("train.optimizer", kind.name, said)
    if parallel.tensor_ranks > 1:
        said = f"is not proven where parallel.tensor_ranks={parallel.tensor_ranks} share a matrix: take adamw, or 1"
        yield Problem("train.optimizer", kind.name, said)


def _precision(config: Config) -> Iterator[Problem]:
    train, parallel, shape = config.train, config.parallel, config.model.architecture
    zero = parallel.backend is Backend.zero
    if train.precision is Precision.fp16 and zero and config.cluster.train.gpus_per_node == 0:
        yield Problem("train.precision", "fp16", "is not DeepSpeed's on CPUs: take fp32, or parallel=fsdp")
    if train.float8 is Float8.none:
        return
    key, value = "train.float8", train.float8.name
    if zero:
        yield Problem(key, value, "is torchao's, which works on FSDP's tensors: take parallel=fsdp, or none")
    if train.precision is not Precision.bf16:
        yield Problem(
            key, value, f"multiplies what is else bf16, and train.precision={train.precision.name}: take bf16"
        )
    if config.adapter.kind is not AdapterKind.none:
        yield Problem(
            key, value, "trains whole weights, and an adapter freezes them: take adapter=lora_float8, or none"
        )
    if config.cluster.train.gpus_per_node == 0:
        yield Problem(key, value, "needs GPUs with 8-bit products (Ada, Hopper or later): take none on CPUs")
    if parallel.tensor_ranks > 1 or parallel.offload_parameters:
        yield Problem(key, value, "is not proven with parallel.tensor_ranks or offload_parameters: take parallel=fsdp")
    if shape and (odd := [size for size in (shape.hidden_size, shape.intermediate_size) if size % 16]):
        yield Problem(key, value, f"needs widths that 16 divides, and this model has {odd[0]}: take none")
