"""Counts the parameters of a model and of its adapters from the model's shape, without building it; pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.choices import AdapterKind
from conf.schema_model import Architecture
from conf.schema_training import Adapter
from launcher.estimate import blocks, layer_kinds
from launcher.estimate.blocks import Block


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    total: int
    block: int
    """In the largest decoder block."""
    root: int
    """Outside the blocks: embedding, final norm, output head."""
    head: int
    """In the output head, tied or not."""
    largest: int
    """In the largest single tensor."""
    trained: int
    """Trained parameters: all of them, or those of the adapter. Likewise for the next two."""
    trained_block: int
    trained_root: int
    frozen: int
    """In the base under an adapter; 0 in a full fine-tune."""


def count(shape: Architecture, adapter: Adapter) -> Counts | None:
    """Exact numbers of parameters as transformers and PEFT build them. None where `why_not_counted` says why."""
    kinds = blocks.kinds(shape)
    if not kinds:
        return None
    values, embedding = blocks.values_of(shape), shape.vocab_size * shape.hidden_size
    block = max(each.total for each, _ in kinds)
    root = embedding * (1 if shape.tie_word_embeddings else 2) + _outside(shape, values)
    total = sum(each.total * number for each, number in kinds) + root
    largest = max(embedding, *(each.largest for each, _ in kinds))
    trained, trained_block, trained_root, frozen = total, block, root, 0
    if adapter.kind is not AdapterKind.none:
        trained_root, frozen = _adapter_on_head(shape, adapter) + _saved_outside(shape, adapter), total
        sizes = _adapter_sizes(shape, adapter)
        trained_block = max(size for size, _ in sizes)
        trained = sum(size * number for size, number in sizes) + trained_root
    return Counts(total, block, root, embedding, largest, trained, trained_block, trained_root, frozen)


def why_not_counted(shape: Architecture | None) -> str | None:
    """Why the parameters of a model cannot be counted; None if they can."""
    if shape is None:
        return "model.architecture is not known: its config.json is not on this machine, or lacks the usual fields"
    return layer_kinds.why_not_counted(shape.model_type, blocks.values_of(shape))


def _outside(shape: Architecture, values: Mapping[str, Any]) -> int:
    """Parameters outside the blocks, besides embedding and head: the last norm, positions, the bias of the head."""
    family, hidden = shape.model_type, shape.hidden_size
    with_bias = family in ("phi", "starcoder2", "stablelm", "nemotron", "phimoe", "gpt_neox", "gpt2", "opt", "falcon")
    size = 0 if family == "olmo" else hidden * (1 + with_bias)
    if family in ("gpt2", "opt"):
        size += (shape.max_position_embeddings + 2 * (family == "opt")) * hidden
    if family == "phi" or values["lm_head_bias"]:
        size += shape.vocab_size
    return size


def targets(block: Block, adapter: Adapter) -> list[str]:
    """Linear layers of a block that get an adapter, matched as PEFT does: by name, or by the end of a dotted path."""
    if adapter.targets == ["all-linear"]:
        mapped = ("gate_proj", "up_proj", "down_proj") if block.adapted_experts else ()
        return [path for path in block.linears if not path.endswith(mapped) and not _is_saved(path, adapter)]
    chosen = (path for path in block.linears if any(_is_target(path, target) for target in adapter.targets))
    return [path for path in chosen if not _is_saved(path, adapter)]


def _is_target(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}") or target.endswith(f".{path}")


def _adapter_sizes(shape: Architecture, adapter: Adapter) -> list[tuple[int, int]]:
    """(adapter parameters in a block, number of such blocks). Layers differ with `rank_pattern` and `layers_to_transform`."""
    hidden, chosen = shape.hidden_size, adapter.layers_to_transform
    if not adapter.rank_pattern and not chosen:
        return [(_adapter(each, hidden, adapter, 0), number) for each, number in blocks.kinds(shape)]
    return [
        (_adapter(each, hidden, adapter, layer) if not chosen or layer in chosen else 0, 1)
        for each, layers in blocks.layers_of_kinds(shape)
        for layer in layers
    ]


def _saved_outside(shape: Architecture, adapter: Adapter) -> int:
    """Weights outside of the blocks that are trained whole: the last norm, or a matrix of the vocabulary."""
    of_blocks = {path for block, _ in blocks.kinds(shape) for path in block.linears}
    names = [name for name in adapter.modules_to_save if not any(path.endswith(name) for path in of_blocks)]
    norms = sum(_is_norm(name) for name in names)
    return norms * shape.hidden_size + (len(names) - norms) * shape.vocab_size * shape.hidden_size


def _saved_inside(block: Block, adapter: Adapter) -> int:
    """Weights of a block that are trained whole. A norm counts as all norms of the block."""
    linears = [linear for path, linear in block.linears.items() if _is_saved(path, adapter)]
    size = sum(linear.outputs * (linear.inputs + linear.bias) for linear in linears)
    return size + (block.norms if any(map(_is_norm, adapter.modules_to_save)) else 0)


def _is_saved(path: str, adapter: Adapter) -> bool:
    """Whether a layer is trained whole, and so has no adapter. PEFT compares the ends of names."""
    return path.endswith(tuple(adapter.modules_to_save))


def _is_norm(name: str) -> bool:
    return "norm" in name or "ln_" in name


def rank(adapter: Adapter, path: str) -> int:
    """The rank of the adapter on a layer. `path` is its whole name, of which PEFT compares the end with the patterns."""
    found = (value for pattern, value in adapter.rank_pattern.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, adapter.r)


def _adapter(block: Block, hidden: int, adapter: Adapter, layer: int) -> int:
    """Adapter parameters in one block: A and B for each target, with DoRA also one norm per row."""
    names = targets(block, adapter)
    size = sum(
        rank(adapter, f"model.layers.{layer}.{name}") * (block.linears[name].outputs + block.linears[name].inputs)
        for name in names
    )
    size += sum(block.linears[name].outputs for name in names) if adapter.dora else 0
    size += _saved_inside(block, adapter)
    if adapter.targets != ["all-linear"] or not block.experts:
        return size
    if block.router_is_linear:
        size += adapter.r * (hidden + block.experts)
    if block.adapted_experts:  # PEFT (0.21): gate and up share one adapter of rank 2r
        inner = block.expert_inner
        size += adapter.r * block.experts * (2 * (hidden + 2 * inner) + inner + hidden)
    return size


def _adapter_on_head(shape: Architecture, adapter: Adapter) -> int:
    if "lm_head" not in adapter.targets:
        return 0
    if adapter.layers_to_transform:
        return 0
    return rank(adapter, "lm_head") * (shape.hidden_size + shape.vocab_size) + shape.vocab_size * adapter.dora


def on_experts(block: Block, adapter: Adapter) -> bool:
    """Whether the experts of a block get adapters."""
    return adapter.kind is not AdapterKind.none and adapter.targets == ["all-linear"] and block.adapted_experts
