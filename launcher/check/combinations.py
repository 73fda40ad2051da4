"""Refuses pairs of options that do not work together: adapter, optimizer and precision with each other and with the layout.

Pure: reads the config alone.
"""

import math
import re
from collections.abc import Iterator

from conf.choices import (
    AdapterInit,
    AdapterKind,
    Backend,
    Checkpointing,
    Float8,
    Frozen,
    Init,
    MergeBase,
    Optimizer,
    Order,
    Precision,
    Verify,
)
from conf.errors import Problem, as_typed
from conf.schema import Config

NEED_AN_ADAPTER = (
    "dora",
    "rslora",
    "lora_plus_ratio",
    "base",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "modules_to_save",
    "source",
    "init",
)
PAGED_OPTIMIZERS = (Optimizer.paged_adamw, Optimizer.paged_adamw_8bit)
MATRIX_OPTIMIZERS = (Optimizer.adafactor, Optimizer.muon)
"""Optimizers that need each weight as a 2-D matrix. ZeRO gives its optimizer flattened 1-D parts."""


def problems(config: Config) -> Iterator[Problem]:
    """Yield one problem for each pair of values that does not work, with the value to use instead."""
    yield from _adapter(config)
    yield from _merge_of_quantized_base(config)
    yield from _optimizer(config)
    yield from _weights_by_name(config)
    yield from _answers(config)
    yield from _rows_and_noise(config)
    yield from _precision(config)
    yield from _reentrant(config)
    if config.train.float8 is not Float8.none:
        yield from _float8(config)


def _adapter(config: Config) -> Iterator[Problem]:
    adapter, parallel = config.adapter, config.parallel
    if adapter.kind is AdapterKind.none:
        for key in NEED_AN_ADAPTER:
            value = getattr(adapter, key)
            if value not in (False, None, Frozen.full, AdapterInit.default, {}, []):
                yield Problem(
                    f"adapter.{key}", as_typed(value), "needs an adapter, but adapter.kind=none. Add adapter=lora"
                )
        return
    yield from _adapter_patterns(config)
    yield from _adapter_init(config)
    quantized = adapter.base is not Frozen.full
    if adapter.dora and parallel.backend is Backend.zero and parallel.zero_stage == 3:
        message = "reads base weights after ZeRO-3 has freed them. Use parallel=fsdp or parallel=zero2"
        yield Problem("adapter.dora", True, message)
    if adapter.dora and quantized:
        message = f"needs the norms of the base weights, but adapter.base={adapter.base.name} stores them quantized. "
        yield Problem("adapter.dora", True, message + "Use adapter.base=full or adapter.dora=false")
    if quantized and config.model.init is Init.random:
        message = "quantizes weights that are read from files, but model.init=random reads none. "
        message += "Use adapter=lora, or a model with model.init=pretrained"
        yield Problem("adapter.base", adapter.base.name, message)


def _adapter_init(config: Config) -> Iterator[Problem]:
    """Where new adapters begin."""
    adapter, key = config.adapter, "adapter.init"
    if adapter.init is AdapterInit.default:
        return
    if adapter.source is not None:
        message = f"has no effect, because adapter.source={adapter.source} has the weights. Remove one of them"
        yield Problem(key, adapter.init.name, message)
    if adapter.init is AdapterInit.gaussian:
        return
    message = "begins with a part of the base, which it takes off: "
    if adapter.base is not Frozen.full:
        remedy = f"adapter.base={adapter.base.name} is rounded, so it cannot be taken off. Use adapter=lora"
        yield Problem(key, adapter.init.name, message + remedy)
    if adapter.dora:
        yield Problem(key, adapter.init.name, message + "DoRA needs the whole base. Use adapter=lora")
    if config.model.init is Init.random:
        remedy = "model.init=random has no stored base. Use a model with model.init=pretrained"
        yield Problem(key, adapter.init.name, message + remedy)


def _adapter_patterns(config: Config) -> Iterator[Problem]:
    """Ranks and alphas by pattern, and the numbers of the blocks that get adapters."""
    adapter, shape = config.adapter, config.model.architecture
    for key, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        for pattern, value in getattr(adapter, key).items():
            yield from _regular_expression(f"adapter.{key}", pattern)
            if not least <= value < math.inf:
                yield Problem(f"adapter.{key}.{pattern}", value, f"must be at least {least} and finite")
    for name in set(adapter.modules_to_save) & set(adapter.targets):
        message = f"has an adapter too (adapter.targets={as_typed(adapter.targets)}). Remove it from one of them"
        yield Problem("adapter.modules_to_save", name, message)
    for number in adapter.layers_to_transform:
        if number < 0 or (shape and number >= shape.num_hidden_layers):
            there = f"0 to {shape.num_hidden_layers - 1}" if shape else "from 0"
            yield Problem(
                "adapter.layers_to_transform", number, f"the blocks of the model are {there}. Use these numbers"
            )


def _regular_expression(key: str, pattern: str) -> Iterator[Problem]:
    try:
        re.compile(pattern)
    except re.error as error:
        message = f"is no regular expression ({error}). Put \\ before a character that has a meaning in one"
        yield Problem(key, pattern, message)


def _merge_of_quantized_base(config: Config) -> Iterator[Problem]:
    """Merging an adapter: into the original base, or into the dequantized one that it was trained on."""
    adapter, into = config.adapter, config.consolidate.base
    if adapter.kind is AdapterKind.none:
        return
    if into is MergeBase.dequantised and adapter.base is not Frozen.nf4:
        message = (
            f"works with adapter.base=nf4 only, but adapter.base={adapter.base.name}. Use consolidate.base=original"
        )
        yield Problem("consolidate.base", "dequantised", message)
    quantized = adapter.base is not Frozen.full
    if config.consolidate.verify is Verify.logits and quantized and into is not MergeBase.dequantised:
        message = (
            f"compares with logits that training computed on the {adapter.base.name} base, "
            "but the adapter is merged into the original base, so they differ. Use consolidate.verify=weights"
        )
        message += " or consolidate.base=dequantised" if adapter.base is Frozen.nf4 else ""
        yield Problem("consolidate.verify", "logits", message)


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer, parallel = config.train.optimizer, config.parallel
    zero = parallel.backend is Backend.zero
    if optimizer is Optimizer.adamw:
        return
    if zero and optimizer in MATRIX_OPTIMIZERS:
        message = "needs 2-D weights, but ZeRO flattens them. Use parallel=fsdp, parallel=hsdp or parallel=ddp"
        yield Problem("train.optimizer", optimizer.name, message)
    if not zero and optimizer in PAGED_OPTIMIZERS:
        message = "is from bitsandbytes, which cannot update the tensors of FSDP (also parallel=ddp). "
        message += "Use train.optimizer=adamw_8bit (from torchao), or parallel=zero2"
        yield Problem("train.optimizer", optimizer.name, message)
    if optimizer in PAGED_OPTIMIZERS and config.cluster.train.gpus_per_node == 0:
        message = "moves GPU memory to the host, but cluster.train.gpus_per_node=0. Use train.optimizer=adamw"
        yield Problem("train.optimizer", optimizer.name, message)
    if parallel.offload_optimizer:
        message = "keeps its state on the GPU, but parallel.offload_optimizer=true keeps it in host memory. "
        message += "Use train.optimizer=adamw, or a layout without offload"
        yield Problem("train.optimizer", optimizer.name, message)
    if parallel.tensor_ranks > 1:
        message = f"is not tested with parallel.tensor_ranks={parallel.tensor_ranks}. "
        message += "Use train.optimizer=adamw or parallel.tensor_ranks=1"
        yield Problem("train.optimizer", optimizer.name, message)


def _weights_by_name(config: Config) -> Iterator[Problem]:
    """`train.unfrozen` and `train.learning_rates`: regular expressions of the names of trained weights."""
    train = config.train
    for key, patterns in (("unfrozen", train.unfrozen), ("learning_rates", list(train.learning_rates))):
        for pattern in patterns:
            yield from _regular_expression(f"train.{key}", pattern)
    if train.unfrozen and config.adapter.kind is not AdapterKind.none:
        message = (
            "names weights of the base, which an adapter freezes. Use adapter=none, or name layers in adapter.targets"
        )
        yield Problem("train.unfrozen", as_typed(train.unfrozen), message)
    for pattern, rate in train.learning_rates.items():
        if not 0 <= rate < math.inf:
            yield Problem(f"train.learning_rates.{pattern}", rate, "must be at least 0 and finite")


def _answers(config: Config) -> Iterator[Problem]:
    generate = config.generate
    if generate.top_p < 1 and generate.temperature == 0:
        message = (
            "has no effect, because generate.temperature=0 takes the most likely token. Set generate.temperature=0.7"
        )
        yield Problem("generate.top_p", generate.top_p, message)
    if generate.compare_base and config.model.init is Init.random:
        message = "needs weights from before training, but model.init=random. Set generate.compare_base=false"
        yield Problem("generate.compare_base", True, message)


def _rows_and_noise(config: Config) -> Iterator[Problem]:
    if config.data.order is Order.length and config.data.packing:
        message = (
            "sorts rows by length, but packed rows are equally long. Use data.order=balanced or data.packing=false"
        )
        yield Problem("data.order", "length", message)
    for key in ("context_ranks", "tensor_ranks") if config.train.neftune_alpha else ():
        if (ranks := getattr(config.parallel, key)) > 1:
            message = f"is not tested with parallel.{key}={ranks}. Use train.neftune_alpha=null or parallel.{key}=1"
            yield Problem("train.neftune_alpha", config.train.neftune_alpha, message)


def _precision(config: Config) -> Iterator[Problem]:
    zero = config.parallel.backend is Backend.zero
    if config.train.precision is Precision.fp16 and zero and config.cluster.train.gpus_per_node == 0:
        message = "DeepSpeed does not support fp16 on CPUs. Use train.precision=fp32 or parallel=fsdp"
        yield Problem("train.precision", "fp16", message)
    if config.train.tf32 and not config.cluster.train.gpus_per_node:
        message = "is arithmetic of GPUs, but cluster.train.gpus_per_node=0. Set train.tf32=false"
        yield Problem("train.tf32", True, message)


def _reentrant(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.reentrant_checkpointing and train.activation_checkpointing is not Checkpointing.full:
        message = f"recomputes whole blocks, but train.activation_checkpointing={train.activation_checkpointing.name}. "
        yield Problem("train.reentrant_checkpointing", True, message + "Set train.activation_checkpointing=full")


def _float8(config: Config) -> Iterator[Problem]:
    """Training in float8, which torchao does on FSDP's tensors."""
    train, parallel, shape = config.train, config.parallel, config.model.architecture
    key, value = "train.float8", train.float8.name
    if parallel.backend is Backend.zero:
        yield Problem(key, value, "works with FSDP only. Use parallel=fsdp or train.float8=none")
    if train.precision not in (Precision.bf16, Precision.auto):  # GPUs with float8 have bf16
        message = f"needs train.precision=bf16 for all other operations, but train.precision={train.precision.name}. "
        yield Problem(key, value, message + "Set train.precision=bf16")
    if config.adapter.kind is not AdapterKind.none:
        message = "trains all weights, but an adapter freezes them. Use adapter=lora_float8 or train.float8=none"
        yield Problem(key, value, message)
    if config.cluster.train.gpus_per_node == 0:
        message = "needs GPUs with 8-bit matrix products (Ada, Hopper or later), but cluster.train.gpus_per_node=0. "
        yield Problem(key, value, message + "Use train.float8=none")
    if parallel.tensor_ranks > 1 or parallel.offload_parameters:
        message = "is not tested with parallel.tensor_ranks above 1 or parallel.offload_parameters=true. "
        yield Problem(key, value, message + "Use parallel=fsdp without them, or train.float8=none")
    for name in ("hidden_size", "intermediate_size") if shape else ():
        if (size := getattr(shape, name)) % 16:
            message = f"needs layer sizes divisible by 16, but model.architecture.{name}={size}. Use train.float8=none"
            yield Problem(key, value, message)
            break  # one size is enough to say no
