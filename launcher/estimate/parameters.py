"""Counts parameters from a model's shape, all and an adapter's, without building it; pure."""

from dataclasses import dataclass

from conf.choices import AdapterKind
from conf.schema import Adapter, Architecture

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
"""Values of `model_type` whose layers are known here; of others nothing is estimated."""


@dataclass(frozen=True)
class Counts:
    """Parameters, in elements."""

    total: int
    block: int
    """Of one decoder block."""
    root: int
    """Of everything outside the blocks: embedding, final norm, output head."""
    head: int
    """Of the output head, tied or not."""
    largest: int
    """Of the largest single tensor."""
    trained: int
    """All, or an adapter's; likewise in a block and outside the blocks."""
    trained_block: int
    trained_root: int
    frozen: int
    """The base under an adapter, else none."""


def count(shape: Architecture, adapter: Adapter) -> Counts | None:
    """Exact parameter counts, as transformers and PEFT build them; None for a family that is not known here."""
    if shape.model_type not in FAMILIES:
        return None
    layers, embedding = shape.num_hidden_layers, shape.vocab_size * shape.hidden_size
    linear = linears(shape)
    block = sum(rows * columns + rows * bias for rows, columns, bias in linear.values()) + 2 * shape.hidden_size
    largest = max(embedding, *(rows * columns for rows, columns, _ in linear.values()))
    if number := experts(shape):
        block += number * (3 * shape.intermediate_size + 1) * shape.hidden_size  # fused tensors, and the router
        largest = max(largest, number * 2 * shape.intermediate_size * shape.hidden_size)
    if shape.model_type == "qwen3":
        block += 2 * head_dim(shape)
    root = embedding * (1 if shape.tie_word_embeddings else 2) + shape.hidden_size
    trained_block, trained_root, frozen = block, root, 0
    total = layers * block + root
    if adapter.kind is not AdapterKind.none:
        trained_block = sum(adapter.r * (linear[name][0] + linear[name][1]) for name in targets(shape, adapter))
        trained_block += _expert_adapter(shape, adapter.r) if on_experts(adapter) else 0
        trained_root = adapter.r * (shape.hidden_size + shape.vocab_size) * ("lm_head" in adapter.targets)
        if adapter.dora:  # a norm for each row
            trained_block += sum(linear[name][0] for name in targets(shape, adapter))
            trained_root += shape.vocab_size * ("lm_head" in adapter.targets)
        frozen = total
    trained = layers * trained_block + trained_root
    return Counts(total, block, root, embedding, largest, trained, trained_block, trained_root, frozen)


def head_dim(shape: Architecture) -> int:
    default = 128 if shape.model_type == "qwen3" else shape.hidden_size // shape.num_attention_heads
    return int(shape.extra.get("head_dim") or default)


def experts(shape: Architecture) -> int:
    return int(shape.extra.get("num_local_experts", 8)) if shape.model_type == "mixtral" else 0


def linears(shape: Architecture) -> dict[str, tuple[int, int, bool]]:
    """Linear layers of a block: name -> (outputs, inputs, whether it has a bias). Experts are no such layers."""
    query, key = (heads * head_dim(shape) for heads in (shape.num_attention_heads, shape.num_key_value_heads))
    biased = shape.model_type in ("llama", "qwen3") and bool(shape.extra.get("attention_bias", False))
    of_input = biased or shape.model_type == "qwen2"
    found = {
        "q_proj": (query, shape.hidden_size, of_input),
        "k_proj": (key, shape.hidden_size, of_input),
        "v_proj": (key, shape.hidden_size, of_input),
        "o_proj": (shape.hidden_size, query, biased),
    }
    if not experts(shape):
        bias = shape.model_type == "llama" and bool(shape.extra.get("mlp_bias", False))
        for name in ("gate_proj", "up_proj"):
            found[name] = (shape.intermediate_size, shape.hidden_size, bias)
        found["down_proj"] = (shape.hidden_size, shape.intermediate_size, bias)
    return found


def targets(shape: Architecture, adapter: Adapter) -> list[str]:
    """Linear layers of a block that get an adapter, matched as PEFT does: the name, or the end of a dotted one."""
    if adapter.targets == ["all-linear"]:
        return list(linears(shape))
    wanted = {target.rpartition(".")[2] for target in adapter.targets}
    return [name for name in linears(shape) if name in wanted]


def on_experts(adapter: Adapter) -> bool:
    return adapter.kind is not AdapterKind.none and adapter.targets == ["all-linear"]


def _expert_adapter(shape: Architecture, r: int) -> int:
    """Elements of the adapters that PEFT (0.21) gives a block's experts, gate and up as one of rank 2r, and its router."""
    hidden, inner, number = shape.hidden_size, shape.intermediate_size, experts(shape)
    return r * number * (2 * (hidden + 2 * inner) + inner + hidden) + r * (hidden + number) if number else 0
